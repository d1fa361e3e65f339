// Fuzzes the decoders of csrc/codec: whatever bytes come, they end in StreamError or in arrays of the shapes asked for,
// within bounded memory and time. A target for libFuzzer (PGOLF_LIBFUZZER), and alone a fuzzer of its own:
// deterministic mutations of streams that the encoder wrote.
//
//     decode [--seconds N] [--runs N] [--seed N]   mutate until the time is up or the runs are done
//     decode FILE...                               run inputs that failed before, one after another
//
// An input that fails is written to fuzz-failure.bin.
#include <sanitizer/common_interface_defs.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <random>

#include "../codec/bind.cpp"
#include "../codec/trellis.h"

// The largest matrix that is run (kMostEntries) needs 8 MB at once for what its rows leave; a lie about sizes asks for
// more.
extern "C" const char* __asan_default_options() {
    return "max_allocation_size_mb=16:hard_rss_limit_mb=2048:handle_abort=1:detect_leaks=0";
}
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1:halt_on_error=1"; }

namespace pgolf::codec {
namespace {

constexpr std::size_t kMostEntries = std::size_t{1} << 22, kMostBytes = std::size_t{1} << 16;
constexpr unsigned kSecondsPerInput = 60;

// What a decoder is asked: a group's bytes and its matrices' shapes, or general bytes and how many they are.
struct Input {
    bool group = false;
    std::vector<std::array<std::uint16_t, 2>> shapes;  // in codes, see `length`
    std::uint16_t size = 0;                            // of general bytes, times 2^shift
    std::uint8_t shift = 0;
    Bytes coded;
};

constexpr std::size_t kMostMatrices = 8;

// A side of a matrix: small ones as they are, the last codes are powers of two, up to beyond any limit.
std::size_t length(std::uint16_t code) { return code < 0xf000 ? code : std::size_t{1} << (code & 63); }

Bytes pack(const Input& input) {
    Bytes out{static_cast<std::uint8_t>(input.group)};
    const auto put = [&](std::uint16_t value) {
        out.push_back(static_cast<std::uint8_t>(value));
        out.push_back(static_cast<std::uint8_t>(value >> 8));
    };
    if (input.group) {
        out.push_back(static_cast<std::uint8_t>(input.shapes.size()));
        for (const auto& [rows, columns] : input.shapes) put(rows), put(columns);
    } else {
        out.push_back(input.shift);
        put(input.size);
    }
    out.insert(out.end(), input.coded.begin(), input.coded.end());
    return out;
}

Input unpack(std::span<const std::uint8_t> data) {
    std::size_t at = 0;
    const auto byte = [&] { return at < data.size() ? data[at++] : std::uint8_t{0}; };
    const auto word = [&] {
        const int low = byte();
        return static_cast<std::uint16_t>(low | byte() << 8);
    };
    Input input;
    input.group = byte() & 1;
    if (input.group) {
        input.shapes.resize(byte() % (kMostMatrices + 1));
        for (auto& [rows, columns] : input.shapes) rows = word(), columns = word();
    } else {
        input.shift = byte();
        input.size = word();
    }
    input.coded.assign(data.begin() + static_cast<std::ptrdiff_t>(at), data.end());
    return input;
}

py::bytes as_bytes(std::span<const std::uint8_t> data) {
    return {reinterpret_cast<const char*>(data.data()), data.size()};
}

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "fuzz: %s\n", what);
    std::abort();
}

struct Decoded {
    std::vector<Int8Array> matrices;
    Sizes sizes;
};

Decoded decode(const Input& input, int threads, std::uint8_t unwritten) {
    py::array::unwritten = unwritten;
    std::vector<std::pair<std::size_t, std::size_t>> shapes;
    for (const auto& [rows, columns] : input.shapes) shapes.emplace_back(length(rows), length(columns));
    auto result = decode_groups({{as_bytes(input.coded), shapes}}, threads);
    return {std::move(result[0].first), std::move(result[0].second)};
}

void expect_equal(const std::vector<Int8Array>& a, const std::vector<Int8Array>& b, const char* what) {
    for (std::size_t i = 0; i < a.size(); ++i)
        if (a[i].size() != b[i].size() || !std::equal(a[i].data(), a[i].data() + a[i].size(), b[i].data())) fail(what);
}

void run_group(const Input& input) {
    const Decoded first = decode(input, 1, 0x55);
    std::size_t entries = 0, bytes = 0;
    for (std::size_t i = 0; i < input.shapes.size(); ++i) {
        const auto& matrix = first.matrices[i];
        if (matrix.ndim() != 2 || matrix.size() != length(input.shapes[i][0]) * length(input.shapes[i][1]))
            fail("a decoded matrix has another shape than asked for");
        entries += matrix.size();
        bytes += first.sizes[i];
    }
    if (bytes != input.coded.size()) fail("the sizes of the matrices do not add up");
    if (entries > kMostBytes) return;
    expect_equal(first.matrices, decode(input, 3, 0xaa).matrices, "two decodings of the same bytes differ");
    const auto again = encode_groups({first.matrices}, 1);
    const auto coded = view(again[0].first);
    Input second = input;
    second.coded.assign(coded.begin(), coded.end());
    expect_equal(first.matrices, decode(second, 1, 0x55).matrices, "what was decoded does not survive coding");
}

void run_bytes(const Input& input) {
    const std::size_t size = std::size_t{input.size} << (input.shift % 48);
    const py::bytes data = decode_data(as_bytes(input.coded), size);
    if (view(data).size() != size) fail("decoded bytes are not as many as asked for");
    const auto same = [&](const py::bytes& other) {
        return static_cast<std::string_view>(data) == static_cast<std::string_view>(other);
    };
    if (!same(decode_data(as_bytes(input.coded), size))) fail("two decodings of the same bytes differ");
    if (!same(decode_data(encode_data(data), size))) fail("what was decoded does not survive coding");
}

// Runs one input; how it ended, in words.
std::string run(const Input& input) {
    // What a decoder may take up, in proportion to its bytes, it may take time for as well: too much for a fuzzer.
    if (input.group) {
        std::size_t entries = 0;
        for (const auto& [rows, columns] : input.shapes)
            entries += std::min(length(rows) * length(columns), kMostBytes << 40);
        if (entries > kMostEntries && entries / kMaxEntriesPerByte <= input.coded.size()) return "left out: too large";
    } else {
        const std::size_t size = std::size_t{input.size} << (input.shift % 48);
        if (size > kMostBytes && size / kMaxBytesPerByte <= input.coded.size()) return "left out: too large";
    }
    try {
        input.group ? run_group(input) : run_bytes(input);
    } catch (const StreamError& error) {
        return error.what();
    } catch (const py::value_error& error) {
        return error.what();
    }
    return "decoded";
}

}  // namespace
}  // namespace pgolf::codec

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    pgolf::codec::run(pgolf::codec::unpack({data, size}));
    return 0;
}

#ifndef PGOLF_LIBFUZZER
#include "mutate.h"

namespace {

using namespace pgolf::codec;

Bytes current;  // the input that is running, for the handlers below

void keep_input() {
    std::ofstream("fuzz-failure.bin", std::ios::binary)
        .write(reinterpret_cast<const char*>(current.data()), static_cast<std::streamsize>(current.size()));
    std::fputs("fuzz: the input is in fuzz-failure.bin\n", stderr);
}

void time_is_up(int) {
    std::fputs("fuzz: an input took too long\n", stderr);
    std::abort();
}

std::string run_packed(Bytes input) {
    current = std::move(input);
    alarm(kSecondsPerInput);
    std::string outcome = run(unpack(current));
    alarm(0);
    return outcome;
}

int run_files(const std::vector<std::string>& paths) {
    for (const auto& path : paths) {
        std::ifstream file(path, std::ios::binary);
        if (!file) {
            std::fprintf(stderr, "fuzz: cannot read %s\n", path.c_str());
            return 2;
        }
        const std::string outcome = run_packed({std::istreambuf_iterator<char>(file), {}});
        std::printf("%s: %s\n", path.c_str(), outcome.c_str());
    }
    return 0;
}

}  // namespace

int main(int count, char** words) {
    __sanitizer_set_death_callback(keep_input);
    signal(SIGALRM, time_is_up);
    double seconds = 600;
    std::uint64_t runs = ~std::uint64_t{0}, seed = 0;
    std::vector<std::string> paths;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        const bool number = i + 1 < count;
        if (word == "--seconds" && number)
            seconds = std::atof(words[++i]);
        else if (word == "--runs" && number)
            runs = std::strtoull(words[++i], nullptr, 10);
        else if (word == "--seed" && number)
            seed = std::strtoull(words[++i], nullptr, 10);
        else
            paths.push_back(word);
    }
    if (!paths.empty()) return run_files(paths);

    const auto start = std::chrono::steady_clock::now();
    const auto elapsed = [&] {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    Mutator mutator(seed);
    for (const Input& input : mutator.corpus()) run_packed(pack(input));
    std::map<std::string, std::uint64_t> outcomes;
    std::uint64_t done = 0;
    double slowest = 0;
    for (; done < runs && elapsed() < seconds; ++done) {
        const double before = elapsed();
        ++outcomes[run_packed(pack(mutator.next()))];
        slowest = std::max(slowest, elapsed() - before);
    }
    std::printf("fuzz: %llu inputs from %zu streams in %.0f s, the slowest %.2f s\n",
                static_cast<unsigned long long>(done), mutator.corpus().size(), elapsed(), slowest);
    for (const auto& [outcome, times] : outcomes)
        std::printf("%12llu  %s\n", static_cast<unsigned long long>(times), outcome.c_str());
    return 0;
}
#endif
