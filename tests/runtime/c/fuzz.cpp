// Damaged cards, plans, parameters and scans through the whole library, with the fake engine: each
// is refused with a line, or becomes a finite map. Built with sanitizers, which watch the rest.
//
//   fuzz FOLDER RUNS SECONDS CARD...      writes "RUNS refused opened mapped"
//
// LLVMFuzzerTestOneInput() is libFuzzer's entry: -DQSM_LIBFUZZER leaves main() to it, and has it
// read the file as a graph too, which the fake engine does not.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "qsm_runtime.h"
#ifdef QSM_LIBFUZZER
#include "error.h"
#include "graph.h"
#endif

namespace {

#define REQUIRE(condition)                                                                      \
    do {                                                                                        \
        if (!(condition)) {                                                                     \
            std::fprintf(stderr, "%s:%d: %s; last error: %s\n", __FILE__, __LINE__, #condition, \
                         qsm_last_error());                                                     \
            std::abort();                                                                       \
        }                                                                                       \
    } while (0)

using Dice = std::mt19937;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInf = HUGE_VAL;
const char *const kTokens[] = {
    "0",     "-1",     "1e999", "-0.0",  "1e-999", "4096",     "4097", "2147483648",
    "null",  "true",   "[]",    "{}",    "\"\"",   "\"x\"",    "NaN",  "9223372036854775808",
    "[[[[[", "1e30",   "0.5",   "\\",    "\"",     "\\ud800",  ":",    ",",
    "{\"",   "\xc3\x28", "\n",  "\x7f",  "}",      "\"n\":1,", "1000", "65",
    "\"LPS\""};

std::string folder = ".";
long opened = 0, mapped = 0;

template <class T, size_t N>
T one_of(const T (&all)[N], Dice &dice) {
    return all[dice() % N];
}

// Replaces a value, or harms the text wherever it may be.
void damage(std::string &text, Dice &dice) {
    const auto at = [&] { return text.empty() ? 0 : dice() % text.size(); };
    const size_t place = at(), value = text.find(':', place);
    switch (dice() % 8) {
        case 0:
            if (!text.empty()) text[place] = char(text[place] ^ (1 << dice() % 8));
            break;
        case 1:
            text.insert(place, one_of(kTokens, dice));
            break;
        case 2:
            text.erase(place, 1 + dice() % 64);
            break;
        case 3:
            text.insert(place, text.substr(at(), dice() % 64));
            break;
        case 4:
            if (dice() % 8 == 0) text.resize(place);
            break;
        default:
            if (value == std::string::npos) break;
            const size_t end = std::min(text.find_first_of(",]}", value), text.size());
            text.replace(value + 1, end - value - 1, one_of(kTokens, dice));
    }
}

// Sets some of what a caller may get wrong; sizes only to less than there is.
void damage(qsm_params &params, qsm_scan &scan, Dice &dice) {
    const double numbers[] = {0, -1, kNaN, kInf, -kInf, 1e-300, 1e300, 1, 0.01, 7};
    const int32_t integers[] = {0, -1, -2, 1, 3, 4, 8, 12, INT32_MIN, INT32_MAX};
    int32_t *const whole[] = {&params.memory_order, &params.patch,          &params.overlap,
                              &params.blend,        &params.allow_geometry, &params.threads};
    *one_of(whole, dice) = one_of(integers, dice);
    if (dice() % 4 == 0) {
        for (char &letter : params.axes) letter = "RLAPSI\0\n\xff"[dice() % 9];
    }
    if (dice() % 2) scan.voxel_size_mm[dice() % 3] = one_of(numbers, dice);
    if (dice() % 2) scan.b0_direction[dice() % 3] = one_of(numbers, dice);
    if (dice() % 4 == 0) scan.shape[dice() % 3] = int32_t(dice() % 7) - 2;
    if (dice() % 4 == 0) params.data_consistency_lambda = one_of(numbers, dice);
    if (dice() % 4 == 0) params.data_consistency_iterations = int32_t(dice() % 5) - 1;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const size_t numbers = std::min<size_t>(size, 4);  // decide all but the card, which follows
    std::seed_seq seed(data, data + numbers);
    Dice dice(seed);
    const std::string path = folder + (dice() % 4 ? "/fuzz.onnx" : "/fuzz.plan");
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char *>(data + numbers), std::streamsize(size - numbers));
#ifdef QSM_LIBFUZZER
    try {
        qsm::host::require_bounded_graph(path, std::string(data + numbers, data + size));
    } catch (const qsm::host::Error &) {
    }
#endif
    qsm_engine *engine = nullptr;
    qsm_params params = qsm_default_params();
    params.device = int32_t(dice() % 3);
    const qsm_status status = qsm_engine_open(path.c_str(), &params, &engine);
    const char *said = qsm_last_error();
    REQUIRE(status == QSM_OK ? engine != nullptr : status == QSM_ENGINE_ERROR && !engine);
    if (!engine) {
        REQUIRE(*said && !std::strchr(said, '\n'));
        return 0;
    }
    ++opened;
    std::vector<float> field(6 * 5 * 4), chi(field.size());
    for (size_t n = 0; n < field.size(); ++n) field[n] = 0.05f * std::sin(float(n * n));
    std::vector<uint8_t> mask(field.size(), 1);
    qsm_scan scan = {field.data(), mask.data(), {6, 5, 4}, {1, 1, 1}, {0, 0, 1}};
    params.allow_geometry = int32_t(dice() % 2);
    if (dice() % 2) damage(params, scan, dice);
    params.memory_limit_bytes = 2'000'000;  // what is padded far, and slow, does not fit
    int polls_left = 50;                    // what takes many steps is cancelled
    params.user_data = &polls_left;
    params.cancel = [](void *left) { return int((*static_cast<int *>(left))-- <= 0); };
    const qsm_status made = qsm_reconstruct(engine, &scan, &params, chi.data());
    REQUIRE(made != QSM_INTERNAL_ERROR || std::strstr(qsm_last_error(), "as the test wishes"));
    if (made == QSM_OK) {
        ++mapped;
        for (const float value : chi) REQUIRE(std::isfinite(value));
    } else {
        REQUIRE(qsm_last_error()[0] && !std::strchr(qsm_last_error(), '\n'));
    }
    qsm_engine_close(engine);
    return 0;
}

#ifndef QSM_LIBFUZZER
int main(int count, char **arguments) {
    folder = arguments[1];
    std::vector<std::string> cards;
    for (int n = 4; n < count; ++n) {
        std::ifstream file(arguments[n], std::ios::binary);
        cards.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::atol(arguments[3]));
    Dice dice(1);
    long runs = 0;
    for (; runs < std::atol(arguments[2]) && std::chrono::steady_clock::now() < end; ++runs) {
        std::string text = cards[dice() % cards.size()];
        for (uint32_t times = dice() % 4; times-- > 0;) damage(text, dice);
        for (int n = 0; n < 4; ++n) text.insert(text.begin(), char(dice() % 256));
        LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t *>(text.data()), text.size());
    }
    std::printf("%ld %ld %ld %ld\n", runs, runs - opened, opened, mapped);
    return 0;
}
#endif
