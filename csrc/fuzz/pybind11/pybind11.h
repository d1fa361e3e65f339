// Stand-ins for the little of pybind11 that csrc/codec/bind.cpp uses, so that the very code that Python calls is fuzzed
// without Python. Memory comes from the heap in exact sizes: the address sanitizer then sees every access beyond it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

namespace pybind11 {

using ssize_t = std::ptrdiff_t;

struct value_error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct gil_scoped_release {
    gil_scoped_release() {}
    ~gil_scoped_release() {}
};

class bytes {
  public:
    bytes(const char* data, std::size_t size) : data_(std::make_unique<char[]>(size)), size_(size) {
        std::copy_n(data, size, data_.get());
    }

    explicit operator std::string_view() const { return {data_.get(), size_}; }

  private:
    std::shared_ptr<char[]> data_;
    std::size_t size_;
};

struct array {
    static constexpr int c_style = 0;

    // What a new array holds before it is written: two values in turn show entries that a decoder leaves unwritten.
    static inline std::uint8_t unwritten = 0;
};

template <class T, int>
class array_t : public array {
  public:
    explicit array_t(std::vector<ssize_t> shape) : shape_(std::move(shape)), size_(1) {
        for (const ssize_t length : shape_) size_ *= static_cast<std::size_t>(length);
        data_ = std::make_unique<T[]>(size_);
        std::fill_n(data_.get(), size_, static_cast<T>(unwritten));
    }

    std::size_t ndim() const { return shape_.size(); }
    ssize_t shape(std::size_t axis) const { return shape_[axis]; }
    std::size_t size() const { return size_; }
    const T* data() const { return data_.get(); }
    T* mutable_data() { return data_.get(); }

  private:
    std::vector<ssize_t> shape_;
    std::size_t size_;
    std::shared_ptr<T[]> data_;
};

struct arg {
    explicit arg(const char*) {}
};

template <class Error, class Module>
void register_exception(Module&, const char*, int) {}

}  // namespace pybind11

constexpr int PyExc_ValueError = 0;

// The module's table of functions: compiled, never run.
#define PYBIND11_MODULE(name, variable) \
    template <class Module>             \
    void name(Module& variable)
