// pgolf._codec: lists of arrays in, bytes out, and how many of them each matrix took. Streams are independent, so
// threads share them; the interpreter lock is released meanwhile. Errors of a stream become ValueError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <numeric>
#include <string>
#include <thread>

#include "bytes.h"
#include "linear.h"
#include "matrix.h"

namespace py = pybind11;

namespace pgolf::codec {
namespace {

using Int8Array = py::array_t<std::int8_t, py::array::c_style>;
using Bytes = std::vector<std::uint8_t>;

struct Job {
    std::size_t entries;
    std::function<void()> run;
};

// Runs every job, the longest first, else one begun last keeps a single thread busy at the end; of several failures the
// first in order is thrown, whatever the threads did.
void run_jobs(const std::vector<Job>& jobs, int threads) {
    std::vector<std::size_t> order(jobs.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::ranges::stable_sort(order, std::greater{}, [&](std::size_t i) { return jobs[i].entries; });
    std::vector<std::exception_ptr> failures(jobs.size());
    std::atomic<std::size_t> next{0};
    const auto work = [&] {
        for (std::size_t i; (i = next++) < jobs.size();) {
            try {
                jobs[order[i]].run();
            } catch (...) {
                failures[order[i]] = std::current_exception();
            }
        }
    };
    {
        std::vector<std::jthread> pool;
        for (std::size_t i = 1; i < std::min<std::size_t>(std::max(threads, 1), jobs.size()); ++i)
            pool.emplace_back(work);
        work();
    }
    for (const auto& failure : failures)
        if (failure) std::rethrow_exception(failure);
}

std::size_t entries_of(Range range, std::span<const Shape> shapes) {
    return shapes[range.first].count() * (range.last - range.first);  // all of one shape
}

void put_length(Bytes& out, std::size_t length) {
    for (int shift = 0; shift < 32; shift += 8) out.push_back(static_cast<std::uint8_t>(length >> shift));
}

// Bytes of each matrix in its group, from where they end in its streams (see Stream): the first of a stream also counts
// that stream's field in the table of lengths, so that the sizes add up to the group's.
using Sizes = std::vector<std::size_t>;

Sizes matrix_sizes(const std::vector<Sizes>& ends) {
    Sizes sizes;
    for (const auto& stream : ends)
        for (std::size_t i = 0; i < stream.size(); ++i) sizes.push_back(i ? stream[i] - stream[i - 1] : stream[0] + 4);
    return sizes;
}

// A group of matrices: the byte lengths of its streams (u32, little-endian), then the streams.
std::vector<std::pair<py::bytes, Sizes>> encode_groups(const std::vector<std::vector<Int8Array>>& groups, int threads) {
    std::vector<std::vector<const std::int8_t*>> data(groups.size());
    std::vector<std::vector<Stream>> streams(groups.size());
    std::vector<Job> jobs;
    for (std::size_t g = 0; g < groups.size(); ++g) {
        std::vector<Shape> shapes;
        for (const auto& array : groups[g]) {
            if (array.ndim() != 2) throw py::value_error("a matrix must have two dimensions");
            shapes.push_back({static_cast<std::size_t>(array.shape(0)), static_cast<std::size_t>(array.shape(1))});
            data[g].push_back(array.data());
        }
        const auto plan = plan_streams(shapes);
        streams[g].resize(plan.size());
        for (std::size_t s = 0; s < plan.size(); ++s)
            jobs.push_back({entries_of(plan[s], shapes), [&, g, s, range = plan[s], shape = shapes[plan[s].first]] {
                                streams[g][s] = encode_stream({&data[g][range.first], range.last - range.first}, shape);
                            }});
    }
    {
        py::gil_scoped_release unlocked;
        run_jobs(jobs, threads);
    }
    std::vector<std::pair<py::bytes, Sizes>> result;
    for (const auto& group : streams) {
        Bytes out;
        std::vector<Sizes> ends;
        for (const auto& stream : group) put_length(out, stream.bytes.size());
        for (const auto& stream : group) {
            out.insert(out.end(), stream.bytes.begin(), stream.bytes.end());
            ends.push_back(stream.ends);
        }
        result.emplace_back(py::bytes(reinterpret_cast<const char*>(out.data()), out.size()), matrix_sizes(ends));
    }
    return result;
}

std::span<const std::uint8_t> view(const py::bytes& bytes) {
    const auto text = static_cast<std::string_view>(bytes);
    return {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()};
}

// Every length is checked against the bytes that are there before anything is allocated for it.
std::vector<std::span<const std::uint8_t>> split_group(std::span<const std::uint8_t> coded,
                                                       std::span<const Shape> shapes, std::span<const Range> plan) {
    if (coded.size() < 4 * plan.size()) throw StreamError("coded group ends inside its table of lengths");
    auto rest = coded.subspan(4 * plan.size());
    std::vector<std::span<const std::uint8_t>> streams;
    for (std::size_t s = 0; s < plan.size(); ++s) {
        const std::uint8_t* field = &coded[4 * s];
        const std::size_t length =
            field[0] | field[1] << 8 | field[2] << 16 | static_cast<std::uint32_t>(field[3]) << 24;
        if (length > rest.size()) throw StreamError("coded group ends before its last stream");
        if (entries_of(plan[s], shapes) / kMaxEntriesPerByte > length)
            throw StreamError("coded stream is too short for its matrices");
        streams.push_back(rest.first(length));
        rest = rest.subspan(length);
    }
    if (!rest.empty()) throw StreamError("coded group is longer than its streams");
    return streams;
}

std::vector<std::pair<std::vector<Int8Array>, Sizes>> decode_groups(
    const std::vector<std::pair<py::bytes, std::vector<std::pair<std::size_t, std::size_t>>>>& groups, int threads) {
    std::vector<std::pair<std::vector<Int8Array>, Sizes>> result(groups.size());
    std::vector<std::vector<Sizes>> ends(groups.size());
    std::vector<std::vector<std::int8_t*>> data(groups.size());
    std::vector<Job> jobs;
    for (std::size_t g = 0; g < groups.size(); ++g) {
        std::vector<Shape> shapes;
        for (const auto& [rows, columns] : groups[g].second) {
            constexpr std::size_t limit = std::size_t{1} << 31;
            if (rows >= limit || columns >= limit) throw py::value_error("a matrix is too large");
            shapes.push_back({rows, columns});
        }
        const auto plan = plan_streams(shapes);
        const auto streams = split_group(view(groups[g].first), shapes, plan);
        for (const auto& shape : shapes) {
            result[g].first.emplace_back(std::vector<py::ssize_t>{static_cast<py::ssize_t>(shape.rows),
                                                                  static_cast<py::ssize_t>(shape.columns)});
            data[g].push_back(result[g].first.back().mutable_data());
        }
        ends[g].resize(plan.size());
        for (std::size_t s = 0; s < plan.size(); ++s)
            jobs.push_back({entries_of(plan[s], shapes),
                            [&, g, s, stream = streams[s], range = plan[s], shape = shapes[plan[s].first]] {
                                ends[g][s] =
                                    decode_stream(stream, {&data[g][range.first], range.last - range.first}, shape);
                            }});
    }
    py::gil_scoped_release unlocked;
    run_jobs(jobs, threads);
    for (std::size_t g = 0; g < groups.size(); ++g) result[g].second = matrix_sizes(ends[g]);
    return result;
}

py::bytes encode_data(const py::bytes& data) {
    Bytes out;
    const auto input = view(data);
    {
        py::gil_scoped_release unlocked;
        out = encode_bytes(input);
    }
    return {reinterpret_cast<const char*>(out.data()), out.size()};
}

py::bytes decode_data(const py::bytes& coded, std::size_t size) {
    const auto input = view(coded);
    if (size / kMaxBytesPerByte > input.size()) throw StreamError("coded stream is too short for its bytes");
    Bytes out(size);
    {
        py::gil_scoped_release unlocked;
        decode_bytes(input, out);
    }
    return {reinterpret_cast<const char*>(out.data()), out.size()};
}

// For tests: a dot product and a step of `a` along `b` by every version of Linear's arithmetic that this machine runs.
template <class Version>
std::pair<std::int32_t, std::vector<std::int16_t>> linear_by(std::vector<std::int16_t> a,
                                                             const std::vector<std::int16_t>& b, int step) {
    const std::int32_t sum = Version::dot(a.data(), b.data(), a.size());
    Version::move(a.data(), b.data(), step, a.size());
    return {sum, std::move(a)};
}

std::vector<std::pair<std::int32_t, std::vector<std::int16_t>>> linear_versions(const std::vector<std::int16_t>& a,
                                                                                const std::vector<std::int16_t>& b,
                                                                                int step) {
    if (a.size() != b.size() || a.size() % 16 != 0) throw std::invalid_argument("whole blocks of 16 are wanted");
    std::vector found = {linear_by<Portable>(a, b, step)};
#ifdef PGOLF_X86
    if (__builtin_cpu_supports("avx2")) found.push_back(linear_by<Wide>(a, b, step));
#endif
    return found;
}

}  // namespace
}  // namespace pgolf::codec

PYBIND11_MODULE(_codec, m) {
    using namespace pgolf::codec;
    m.doc() = "Entropy coder of pgolf; use pgolf.codec.";
    py::register_exception<StreamError>(m, "StreamError", PyExc_ValueError);
    m.def("encode_groups", &encode_groups, py::arg("groups"), py::arg("threads"));
    m.def("decode_groups", &decode_groups, py::arg("groups"), py::arg("threads"));
    m.def("encode_bytes", &encode_data, py::arg("data"));
    m.def("decode_bytes", &decode_data, py::arg("coded"), py::arg("size"));
    m.def("linear_versions", &linear_versions, py::arg("a"), py::arg("b"), py::arg("step"));
}
