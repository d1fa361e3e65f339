#include "ops/row_order.h"

#include "bind.h"

namespace pgolf {
namespace {

void row_order(int device, uintptr_t stream, int build, int shared_memory, uintptr_t q, uintptr_t distances,
               uintptr_t order, int rows, int cols) {
    const RowOrder params{.q = pointer<const int8_t>(q),
                          .distances = pointer<uint32_t>(distances),
                          .order = pointer<int64_t>(order),
                          .rows = rows,
                          .cols = cols};
    generic::row_order(params, enter(device, stream, build, shared_memory));
}

}  // namespace

void bind_row_order(py::module_& m) {
    m.def("row_order", &row_order, py::kw_only(), "device"_a, "stream"_a, "build"_a, "shared_memory"_a, "q"_a,
          "distances"_a, "order"_a, "rows"_a, "cols"_a);
    m.def("row_order_scratch", &generic::row_order_scratch, "rows"_a);
}

}  // namespace pgolf
