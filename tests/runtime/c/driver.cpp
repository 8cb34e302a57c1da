// Calls everything in the library, rightly and wrongly, for sanitizers and valgrind to watch.
// Arguments: a folder of models for the fake engine, and models that must be refused. It takes a
// fake driver for libcuda.so.1, and the host twin of libqsm_cuda.
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "qsm_runtime.h"

namespace {

#define REQUIRE(condition)                                                                      \
    do {                                                                                        \
        if (!(condition)) {                                                                     \
            std::fprintf(stderr, "%s:%d: %s; last error: %s\n", __FILE__, __LINE__, #condition, \
                         qsm_last_error());                                                     \
            std::exit(1);                                                                       \
        }                                                                                       \
    } while (0)

// A field of odd size whose mask touches one face and leaves gaps elsewhere.
struct Input {
    std::vector<float> field;
    std::vector<uint8_t> mask;
    qsm_scan scan{};

    Input(int nx, int ny, int nz, int order) : field(size_t(nx * ny * nz)), mask(field.size()) {
        for (int x = 0; x < nx; ++x) {
            for (int y = 0; y < ny; ++y) {
                for (int z = 0; z < nz; ++z) {
                    const int n =
                        order == QSM_X_FASTEST ? x + nx * (y + ny * z) : z + nz * (y + ny * x);
                    mask[size_t(n)] = x < nx - 3 && y > 2 && z > 0 && z < nz - 1 ? 7 : 0;
                    field[size_t(n)] = mask[size_t(n)]
                                           ? 0.05f * std::sin(float(x + 2 * y * y + 3 * z))
                                           : std::numeric_limits<float>::quiet_NaN();
                }
            }
        }
        scan = {field.data(), mask.data(), {nx, ny, nz}, {1, 0.8, 2}, {0.1, -0.4, 0.9}};
    }
};

struct Engine {
    qsm_engine *handle = nullptr;

    explicit Engine(const std::string &path) {
        REQUIRE(qsm_engine_open(path.c_str(), nullptr, &handle) == QSM_OK);
        REQUIRE(qsm_engine_card(handle)[0] == '{');
    }
    Engine(const char *method, int threads) {
        qsm_params params = qsm_default_params();
        params.threads = threads;
        REQUIRE(qsm_engine_open_method(method, &params, &handle) == QSM_OK);
        REQUIRE(!qsm_engine_card(handle));
    }
    ~Engine() { qsm_engine_close(handle); }
    Engine(const Engine &) = delete;
    Engine &operator=(const Engine &) = delete;
};

qsm_params params_of(int order, int patch = QSM_PATCH_AUTO, int overlap = QSM_OVERLAP_AUTO,
                     int blend = QSM_BLEND_AUTO) {
    qsm_params params = qsm_default_params();
    params.memory_order = order;
    params.patch = patch;
    params.overlap = overlap;
    params.blend = blend;
    return params;
}

void patches_of_a_local_network_make_the_whole(const std::string &folder) {
    const Engine engine(folder + "/cnn.onnx");
    for (const int order : {int{QSM_X_FASTEST}, int{QSM_Z_FASTEST}}) {
        const Input input(13, 18, 11, order);
        for (const int patch : {int{QSM_PATCH_AUTO}, int{QSM_PATCH_OFF}, 8, 12}) {
            for (const int blend : {1, 2, 3}) {
                qsm_params params = params_of(order, patch);
                if (patch > 0) params.overlap = 3, params.blend = blend;
                std::vector<float> chi(input.field.size(), 1e9f);
                REQUIRE(qsm_reconstruct(engine.handle, &input.scan, &params, chi.data()) == QSM_OK);
                for (size_t n = 0; n < chi.size(); ++n) {
                    const float wanted = input.mask[n] ? 2 * input.field[n] : 0;
                    REQUIRE(std::fabs(chi[n] - wanted) < 1e-6f);
                }
            }
        }
    }
}

void both_orders_agree_and_the_map_may_lie_on_the_field(const std::string &folder) {
    const Engine engine(folder + "/tkd.onnx");
    std::vector<std::vector<float>> maps;
    for (const int order : {int{QSM_X_FASTEST}, int{QSM_Z_FASTEST}}) {
        Input input(7, 9, 6, order);
        for (const int iterations : {0, 3}) {
            qsm_params params = params_of(order);
            params.data_consistency_lambda = 0.01;
            params.data_consistency_iterations = iterations;
            std::vector<float> chi = input.field;
            input.scan.local_field_ppm = chi.data();
            REQUIRE(qsm_reconstruct(engine.handle, &input.scan, &params, chi.data()) == QSM_OK);
            maps.push_back(chi);
        }
    }
    for (int form = 0; form < 2; ++form) {
        for (int x = 0; x < 7; ++x) {
            for (int y = 0; y < 9; ++y) {
                for (int z = 0; z < 6; ++z) {
                    REQUIRE(maps[size_t(form)][size_t(x + 7 * (y + 9 * z))] ==
                            maps[size_t(form + 2)][size_t(z + 6 * (y + 9 * x))]);
                }
            }
        }
    }
}

// Letters of the ends that axes may run to, one storage after the other.
std::vector<std::string> storages() {
    const std::string orders[] = {"RAS", "RSA", "ARS", "ASR", "SRA", "SAR"}, ends = "RASLPI";
    std::vector<std::string> all;
    for (const std::string &order : orders) {
        for (int flips = 0; flips < 8; ++flips) {
            all.push_back(order);
            for (size_t n = 0; n < 3; ++n) {
                if (flips >> n & 1) all.back()[n] = ends[ends.find(order[n]) + 3];
            }
        }
    }
    return all;
}

// One head as it is stored in these axes.
Input stored(const Input &ras, const std::string &letters, int order) {
    const std::string ends = "RASLPI";
    const auto place = [&](size_t n) { return ends.find(letters[n]) % 3; };
    const int32_t *shape = ras.scan.shape;
    Input input(shape[place(0)], shape[place(1)], shape[place(2)], order);
    for (size_t n = 0; n < 3; ++n) {
        const double sign = ends.find(letters[n]) < 3 ? 1 : -1;
        input.scan.voxel_size_mm[n] = ras.scan.voxel_size_mm[place(n)];
        input.scan.b0_direction[n] = sign * ras.scan.b0_direction[place(n)];
    }
    const int32_t *size = input.scan.shape;
    for (int n = 0; n < int(input.field.size()); ++n) {
        int at[3], from[3];
        at[0] = order == QSM_X_FASTEST ? n % size[0] : n / size[2] / size[1];
        at[1] = order == QSM_X_FASTEST ? n / size[0] % size[1] : n / size[2] % size[1];
        at[2] = order == QSM_X_FASTEST ? n / size[0] / size[1] : n % size[2];
        for (size_t axis = 0; axis < 3; ++axis) {
            const bool flipped = ends.find(letters[axis]) > 2;
            from[place(axis)] = flipped ? size[axis] - 1 - at[axis] : at[axis];
        }
        const auto there = size_t(from[2] + shape[2] * (from[1] + shape[1] * from[0]));
        input.field[size_t(n)] = ras.field[there];
        input.mask[size_t(n)] = ras.mask[there];
    }
    return input;
}

// And of its map, which lies on the field or, on the plan's GPU, too.
void all_storages_give_one_map(const std::string &folder) {
    const Engine host(folder + "/tkd.onnx"), plan(folder + "/tkd.plan");
    const Input ras(7, 9, 6, QSM_Z_FASTEST);
    const auto map = [&](const std::string &letters, int order, bool on_gpu) {
        Input input = stored(ras, letters, order);
        qsm_params params = params_of(order, 8, 2);
        std::strcpy(params.axes, letters.c_str());
        float *chi = input.field.data();
        REQUIRE((on_gpu ? qsm_reconstruct_device(plan.handle, &input.scan, &params, chi, nullptr)
                        : qsm_reconstruct(host.handle, &input.scan, &params, chi)) == QSM_OK);
        return input;
    };
    Input wanted[] = {map("RAS", QSM_Z_FASTEST, false), map("RAS", QSM_Z_FASTEST, true)};
    for (const std::string &letters : storages()) {
        for (const int order : {int{QSM_X_FASTEST}, int{QSM_Z_FASTEST}}) {
            for (const bool on_gpu : {false, order == QSM_Z_FASTEST}) {
                const Input input = map(letters, order, on_gpu);
                REQUIRE(input.field == stored(wanted[on_gpu], letters, order).field);
            }
        }
    }
}

// Calls that must fail with a status and a line, and leave the engine usable.
void refused(qsm_engine *engine, const qsm_scan &scan, const qsm_params &params, float *chi,
             qsm_status wanted) {
    const qsm_status status = qsm_reconstruct(engine, &scan, &params, chi);
    REQUIRE(status == wanted);
    REQUIRE(std::strlen(qsm_last_error()) > 0 && !std::strchr(qsm_last_error(), '\n'));
}

void wrong_arguments_are_refused(const std::string &folder) {
    const Engine engine(folder + "/cnn.onnx");
    qsm_engine *none = nullptr;
    Input input(8, 9, 10, QSM_X_FASTEST);
    std::vector<float> chi(input.field.size());
    const qsm_params good = qsm_default_params();
    REQUIRE(qsm_engine_open(nullptr, nullptr, &none) == QSM_USAGE_ERROR);
    REQUIRE(qsm_engine_open((folder + "/cnn.onnx").c_str(), nullptr, nullptr) == QSM_USAGE_ERROR);
    REQUIRE(qsm_reconstruct(nullptr, &input.scan, &good, chi.data()) == QSM_USAGE_ERROR);
    REQUIRE(qsm_reconstruct(engine.handle, nullptr, &good, chi.data()) == QSM_USAGE_ERROR);
    REQUIRE(qsm_reconstruct_device(nullptr, nullptr, nullptr, nullptr, nullptr) != QSM_OK);
    REQUIRE(qsm_engine_card(nullptr) == nullptr);
    qsm_engine_close(nullptr);
    refused(engine.handle, input.scan, good, nullptr, QSM_USAGE_ERROR);

    const auto with_params = [&](auto change) {
        qsm_params params = good;
        change(params);
        refused(engine.handle, input.scan, params, chi.data(), QSM_USAGE_ERROR);
    };
    with_params([](qsm_params &p) { p.struct_size = 8; });
    with_params([](qsm_params &p) { p.struct_size = 0; });
    with_params([](qsm_params &p) { p.threads = -1; });
    with_params([](qsm_params &p) { p.memory_order = 2; });
    for (const char *axes : {"LP", "LPR", "ras", "LPSR", " "}) {
        with_params([=](qsm_params &p) { std::memcpy(p.axes, axes, std::strlen(axes)); });
    }
    with_params([](qsm_params &p) { p.blend = -1; });
    with_params([](qsm_params &p) { p.blend = 4; });
    with_params([](qsm_params &p) { p.patch = -2; });
    with_params([](qsm_params &p) { p.patch = 5; });
    with_params([](qsm_params &p) { p.overlap = -2; });
    with_params([](qsm_params &p) { p.patch = QSM_PATCH_OFF, p.overlap = 1; });
    with_params([](qsm_params &p) { p.patch = 8, p.overlap = 8; });
    with_params([](qsm_params &p) { p.patch = 8, p.overlap = 2147483647; });
    with_params([](qsm_params &p) { p.data_consistency_lambda = -1; });
    with_params([](qsm_params &p) { p.data_consistency_lambda = 1e-60; });
    with_params([](qsm_params &p) { p.data_consistency_lambda = NAN; });
    with_params([](qsm_params &p) { p.data_consistency_iterations = 5; });
    with_params(
        [](qsm_params &p) { p.data_consistency_lambda = 1, p.data_consistency_iterations = -1; });

    const auto with_scan = [&](qsm_status wanted, auto change) {
        Input changed(8, 9, 10, QSM_X_FASTEST);
        change(changed);
        refused(engine.handle, changed.scan, good, chi.data(), wanted);
    };
    with_scan(QSM_USAGE_ERROR, [](Input &i) { i.scan.local_field_ppm = nullptr; });
    with_scan(QSM_USAGE_ERROR, [](Input &i) { i.scan.mask = nullptr; });
    for (const int32_t size : {0, -8, INT32_MIN, INT32_MAX}) {
        with_scan(QSM_DATA_ERROR, [=](Input &i) { i.scan.shape[1] = size; });
    }
    with_scan(QSM_DATA_ERROR, [](Input &i) { i.scan.shape[0] = i.scan.shape[1] = 1 << 16; });
    for (const double size : {0.0, -1.0, 1e-3, 101.0, double(NAN), double(INFINITY)}) {
        with_scan(QSM_DATA_ERROR, [=](Input &i) { i.scan.voxel_size_mm[2] = size; });
    }
    for (const double b : {0.0, double(NAN), double(INFINITY), 1e300}) {
        with_scan(QSM_DATA_ERROR, [=](Input &i) {
            for (double &component : i.scan.b0_direction) component = b;
        });
    }
    with_scan(QSM_DATA_ERROR, [](Input &i) { std::fill(i.mask.begin(), i.mask.end(), 0); });
    with_scan(QSM_DATA_ERROR, [](Input &i) { std::fill(i.mask.begin(), i.mask.end(), 1); });
    with_scan(QSM_DATA_ERROR, [](Input &i) { std::fill(i.field.begin(), i.field.end(), 0.f); });
    with_scan(QSM_DATA_ERROR, [](Input &i) { std::fill(i.field.begin(), i.field.end(), 12.f); });

    REQUIRE(qsm_reconstruct(engine.handle, &input.scan, nullptr, chi.data()) == QSM_OK);
}

struct Watch {
    int polls_left = 1 << 30, done = 0, total = 0, lines = 0, warnings = 0;
    bool throws = false;
};

qsm_params watched(Watch &watch) {
    qsm_params params = qsm_default_params();
    params.user_data = &watch;
    params.progress = [](int32_t done, int32_t total, void *data) {
        auto &seen = *static_cast<Watch *>(data);
        REQUIRE(done > seen.done && done <= total && (!seen.total || total == seen.total));
        seen.done = done;
        seen.total = total;
    };
    params.cancel = [](void *data) { return int(static_cast<Watch *>(data)->polls_left-- <= 0); };
    params.log = [](int32_t level, const char *line, void *data) {
        REQUIRE(level >= QSM_LOG_INFO && level <= QSM_LOG_WARNING && !std::strchr(line, '\n'));
        auto &seen = *static_cast<Watch *>(data);
        ++seen.lines;
        seen.warnings += level == QSM_LOG_WARNING;
        if (seen.throws) throw std::runtime_error("thrown by a callback");
    };
    return params;
}

void it_can_be_cancelled_at_every_step(const std::string &folder) {
    const Engine engine(folder + "/priors.onnx");
    const Input input(9, 8, 7, QSM_X_FASTEST);
    std::vector<float> chi(input.field.size());
    qsm_status status = QSM_CANCELLED;
    int polls = 0;
    for (; status == QSM_CANCELLED; ++polls) {
        Watch watch;
        watch.polls_left = polls;
        qsm_params params = watched(watch);
        params.patch = 8;
        params.overlap = 2;
        params.data_consistency_lambda = 0.1;
        params.data_consistency_iterations = 2;
        status = qsm_reconstruct(engine.handle, &input.scan, &params, chi.data());
        REQUIRE(status == QSM_OK || status == QSM_CANCELLED);
        REQUIRE(status == QSM_CANCELLED || (watch.done == watch.total && watch.lines > 0));
        REQUIRE(polls < 100);
    }
    REQUIRE(polls > 2 * 3 + 4);
}

void what_goes_wrong_inside_comes_out_as_a_status(const std::string &folder) {
    const Input input(8, 9, 10, QSM_X_FASTEST);
    std::vector<float> chi(input.field.size());
    const auto run = [&](const char *model, const qsm_params &params) {
        const Engine engine(folder + model);
        return qsm_reconstruct(engine.handle, &input.scan, &params, chi.data());
    };
    const qsm_params good = qsm_default_params();
    REQUIRE(run("/fail.onnx", good) == QSM_ENGINE_ERROR);
    REQUIRE(run("/nan.onnx", good) == QSM_ENGINE_ERROR);
    REQUIRE(run("/memory.onnx", good) == QSM_MEMORY_ERROR);
    REQUIRE(run("/throw.onnx", good) == QSM_INTERNAL_ERROR);
    REQUIRE(std::string(qsm_last_error()) == "a bug, as the test wishes");
    qsm_params little = good;
    little.memory_limit_bytes = 1;
    REQUIRE(run("/cnn.onnx", little) == QSM_MEMORY_ERROR);
    Watch watch;
    watch.throws = true;
    REQUIRE(run("/cnn.onnx", watched(watch)) == QSM_INTERNAL_ERROR);
    REQUIRE(run("/eroded.onnx", good) == QSM_OK);
    REQUIRE(run("/erodes-all.onnx", good) == QSM_DATA_ERROR);
    REQUIRE(run("/axial.onnx", good) == QSM_DATA_ERROR);
    qsm_params allowed = good;
    allowed.allow_geometry = 1;
    REQUIRE(run("/axial.onnx", allowed) == QSM_OK);
    REQUIRE(run("/total.onnx", good) == QSM_OK);
    REQUIRE(run("/tiles.onnx", good) == QSM_OK);
    qsm_params fitted = good;
    fitted.data_consistency_lambda = 0.01;
    REQUIRE(run("/total.onnx", fitted) == QSM_USAGE_ERROR);
    qsm_params cut = good;
    cut.patch = 8;
    REQUIRE(run("/tiles.onnx", cut) == QSM_USAGE_ERROR);
}

void methods_need_no_model() {
    std::vector<float> maps[2];
    for (const int order : {int{QSM_X_FASTEST}, int{QSM_Z_FASTEST}}) {
        Input input(9, 7, 5, order);
        for (const char *name : {"tv", "tkd"}) {
            const Engine one(name, 1), four(name, 4);
            qsm_params params = params_of(order);
            if (name[1] == 'v') params.iterations = 3;
            qsm_facts facts;
            params.facts = &facts;
            std::vector<float> chi(input.field.size()), map = input.field;
            REQUIRE(qsm_reconstruct(four.handle, &input.scan, &params, chi.data()) == QSM_OK);
            REQUIRE(facts.iterations == params.iterations);
            REQUIRE((facts.alpha_ppm_mm > 0) == (name[1] == 'v'));
            qsm_scan scan = input.scan;
            scan.local_field_ppm = map.data();
            REQUIRE(qsm_reconstruct(one.handle, &scan, &params, map.data()) == QSM_OK);
            REQUIRE(map == chi);
            maps[order].insert(maps[order].end(), map.begin(), map.end());
        }
    }
    for (int method = 0; method < 2; ++method) {
        for (int n = 0; n < 9 * 7 * 5; ++n) {
            const int x = n % 9, y = n / 9 % 7, z = n / 63, first = method * 9 * 7 * 5;
            REQUIRE(maps[0][size_t(first + n)] == maps[1][size_t(first + z + 5 * (y + 7 * x))]);
        }
    }
}

void a_method_can_be_cancelled_within_its_iterations() {
    const Engine engine("tv", 2);
    const Input input(9, 8, 7, QSM_X_FASTEST);
    std::vector<float> chi(input.field.size());
    qsm_status status = QSM_CANCELLED;
    int polls = 0;
    for (; status == QSM_CANCELLED; ++polls) {
        Watch watch;
        watch.polls_left = polls;
        qsm_params params = watched(watch);
        params.iterations = 2;
        status = qsm_reconstruct(engine.handle, &input.scan, &params, chi.data());
        REQUIRE(status == QSM_OK || status == QSM_CANCELLED);
        REQUIRE(status == QSM_CANCELLED || (watch.done == 2 && watch.total == 2));
        REQUIRE(polls < 20);
    }
    REQUIRE(polls > 2 * 3);
}

void wrong_methods_and_their_parameters_are_refused() {
    qsm_engine *none = nullptr;
    REQUIRE(qsm_engine_open_method("cosmos", nullptr, &none) == QSM_USAGE_ERROR && !none);
    REQUIRE(qsm_engine_open_method(nullptr, nullptr, &none) == QSM_USAGE_ERROR);
    REQUIRE(qsm_engine_open_method("tv", nullptr, nullptr) == QSM_USAGE_ERROR);
    Input input(8, 9, 10, QSM_X_FASTEST);
    std::vector<float> chi(input.field.size());
    const auto with = [&](const char *name, qsm_status wanted, auto change) {
        const Engine engine(name, 2);
        qsm_params params = qsm_default_params();
        change(params);
        refused(engine.handle, input.scan, params, chi.data(), wanted);
    };
    with("tv", QSM_USAGE_ERROR, [](qsm_params &p) { p.alpha_ppm_mm = -1; });
    with("tv", QSM_USAGE_ERROR, [](qsm_params &p) { p.alpha_ppm_mm = NAN; });
    with("tv", QSM_USAGE_ERROR, [](qsm_params &p) { p.alpha_ppm_mm = 1e-60; });
    with("tv", QSM_USAGE_ERROR, [](qsm_params &p) { p.iterations = -1; });
    with("tv", QSM_USAGE_ERROR, [](qsm_params &p) { p.threshold = 0.1; });
    with("tv", QSM_USAGE_ERROR, [](qsm_params &p) { p.patch = 8; });
    with("tv", QSM_USAGE_ERROR, [](qsm_params &p) { p.data_consistency_lambda = 0.01; });
    with("tkd", QSM_USAGE_ERROR, [](qsm_params &p) { p.threshold = 0.7; });
    with("tkd", QSM_USAGE_ERROR, [](qsm_params &p) { p.alpha_ppm_mm = 1e-4; });
    with("tkd", QSM_USAGE_ERROR, [](qsm_params &p) { p.iterations = 1; });
    with("tkd", QSM_MEMORY_ERROR, [](qsm_params &p) { p.memory_limit_bytes = 1; });
    with("tv", QSM_MEMORY_ERROR, [](qsm_params &p) { p.memory_limit_bytes = 1; });
    input.scan.voxel_size_mm[0] = input.scan.voxel_size_mm[1] = input.scan.voxel_size_mm[2] = 0.01;
    with("tv", QSM_MEMORY_ERROR, [](qsm_params &p) { p.memory_limit_bytes = 1 << 30; });
    const Engine engine("tv", 2);
    qsm_params params = qsm_default_params();
    params.memory_order = QSM_Z_FASTEST;
    REQUIRE(qsm_reconstruct_device(engine.handle, &input.scan, &params, chi.data(), nullptr) ==
            QSM_ENGINE_ERROR);
}

void threads_share_an_engine_or_have_their_own(const std::string &folder) {
    const Engine shared(folder + "/tkd.onnx");
    const Input input(9, 8, 7, QSM_X_FASTEST);
    std::vector<float> wanted(input.field.size());
    REQUIRE(qsm_reconstruct(shared.handle, &input.scan, nullptr, wanted.data()) == QSM_OK);
    const auto work = [&](qsm_engine *engine, int n) {
        for (int round = 0; round < 3; ++round) {
            std::vector<float> chi(wanted.size());
            REQUIRE(qsm_reconstruct(engine, &input.scan, nullptr, chi.data()) == QSM_OK);
            REQUIRE(chi == wanted);
            qsm_scan bad = input.scan;
            bad.shape[0] = -n;
            REQUIRE(qsm_reconstruct(engine, &bad, nullptr, chi.data()) == QSM_DATA_ERROR);
            std::this_thread::yield();
            REQUIRE(std::strstr(qsm_last_error(), ("got " + std::to_string(-n)).c_str()));
        }
    };
    std::vector<std::thread> threads;
    for (int n = 1; n <= 4; ++n) {
        threads.emplace_back([&, n] {
            work(shared.handle, n);
            const Engine own(folder + "/tkd.onnx");
            work(own.handle, n + 10);
        });
    }
    for (std::thread &thread : threads) thread.join();
}

void a_gpu_gives_what_the_host_gives(const std::string &folder) {
    struct Case {
        const char *name;
        int patch, iterations;  // of data consistency; -1: none
    };
    for (const Case &at : {Case{"/cnn", 0, -1}, Case{"/cnn", 8, -1}, Case{"/tkd", 8, -1},
                           Case{"/tkd", 0, 0}, Case{"/tkd", 0, 2}, Case{"/priors", 8, -1},
                           Case{"/priors", 0, 2}, Case{"/total", 8, -1}, Case{"/tiles", 0, 0}}) {
        const Engine host(folder + at.name + ".onnx"), plan(folder + at.name + ".plan");
        const Input input(7, 11, 6, QSM_Z_FASTEST);
        qsm_params params = params_of(QSM_Z_FASTEST, at.patch);
        params.data_consistency_lambda = at.iterations < 0 ? 0 : 0.05;
        params.data_consistency_iterations = at.iterations < 0 ? 0 : at.iterations;
        std::vector<float> wanted(input.field.size()), chi[2] = {wanted, wanted};
        const auto run = [&](const Engine &engine, std::vector<float> &to) {
            return qsm_reconstruct(engine.handle, &input.scan, &params, to.data());
        };
        REQUIRE(run(host, wanted) == QSM_OK);
        REQUIRE(run(plan, chi[0]) == QSM_OK);
        REQUIRE(qsm_reconstruct_device(plan.handle, &input.scan, &params, chi[1].data(), nullptr) ==
                QSM_OK);
        for (size_t n = 0; n < wanted.size(); ++n) {
            REQUIRE(std::fabs(chi[0][n] - wanted[n]) < 1e-6f);
            REQUIRE(chi[1][n] == chi[0][n]);
        }
    }
}

void a_gpu_fails_as_a_host_does(const std::string &folder) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    const auto fail_after = reinterpret_cast<void (*)(int)>(dlsym(driver, "fake_fail_after"));
    const auto living = reinterpret_cast<int (*)()>(dlsym(driver, "fake_living"));
    const Input input(5, 5, 6, QSM_Z_FASTEST), larger(9, 12, 7, QSM_Z_FASTEST);
    std::vector<float> chi(larger.field.size());
    qsm_params params = params_of(QSM_Z_FASTEST);
    params.data_consistency_lambda = 0.05;
    const auto run = [&](const std::string &name, const Input &of) {
        const Engine engine(folder + name);
        return qsm_reconstruct_device(engine.handle, &of.scan, &params, chi.data(), nullptr);
    };
    int allocations = 0;
    for (qsm_status status = QSM_MEMORY_ERROR; status != QSM_OK; ++allocations) {
        fail_after(allocations);
        status = run("/tkd.plan", input);
        REQUIRE(status == QSM_OK || status == QSM_MEMORY_ERROR);
        REQUIRE(living() == 0);
    }
    fail_after(-1);
    params.data_consistency_lambda = 0;
    REQUIRE(allocations > 15);
    REQUIRE(run("/fail.plan", larger) == QSM_ENGINE_ERROR);
    REQUIRE(run("/nan.plan", larger) == QSM_ENGINE_ERROR);
    REQUIRE(run("/small.plan", larger) ==
            QSM_OK);  // in patches, though the whole volume fits the memory
    params.patch = QSM_PATCH_OFF;
    REQUIRE(run("/small.plan", larger) == QSM_ENGINE_ERROR);
    REQUIRE(run("/tkd.onnx", larger) == QSM_ENGINE_ERROR);
    params.memory_limit_bytes = 1000;
    REQUIRE(run("/tkd.plan", larger) == QSM_MEMORY_ERROR);
    params.memory_order = QSM_X_FASTEST;
    REQUIRE(run("/tkd.plan", larger) == QSM_USAGE_ERROR);
    REQUIRE(living() == 0);
    dlclose(driver);
    // It keeps its plans otherwise, which valgrind would count as lost.
    void *library = dlopen(std::getenv("QSM_CUDA_LIBRARY"), RTLD_NOW);
    REQUIRE(reinterpret_cast<int (*)()>(dlsym(library, "qsm_cuda_release_plans"))() == 0);
    dlclose(library);
}

qsm_engine *opened(const std::string &path, qsm_device device, qsm_status wanted, Watch &watch) {
    qsm_engine *engine = nullptr;
    qsm_params params = watched(watch);
    params.device = device;
    REQUIRE(qsm_engine_open(path.c_str(), &params, &engine) == wanted && !engine == !!wanted);
    return engine;
}

bool says(const char *words) { return std::strstr(qsm_last_error(), words); }

// Where a plan's engine, its graph, or neither of them is to run.
void a_plan_runs(const std::string &path, qsm_device device, bool on_gpu, int warnings) {
    const Input input(9, 8, 7, QSM_Z_FASTEST);
    const qsm_params params = params_of(QSM_Z_FASTEST);
    std::vector<float> chi(input.field.size());
    Watch watch;
    qsm_engine *engine = opened(path, device, QSM_OK, watch);
    REQUIRE(watch.warnings == warnings);
    REQUIRE(!std::strstr(qsm_engine_card(engine), "\"plan\":\"1\"") == !on_gpu);
    REQUIRE(qsm_reconstruct(engine, &input.scan, &params, chi.data()) == QSM_OK);
    for (size_t n = 0; n < chi.size(); ++n) {
        REQUIRE(std::fabs(chi[n] - (input.mask[n] ? 2 * input.field[n] : 0)) < 1e-6f);
    }
    REQUIRE(qsm_reconstruct_device(engine, &input.scan, &params, chi.data(), nullptr) ==
            (on_gpu ? QSM_OK : QSM_ENGINE_ERROR));
    qsm_engine_close(engine);
}

// Before any other plan is opened: a GPU's libraries stay once they are loaded.
void without_a_gpu_the_graph_in_a_plan_runs(const std::string &folder) {
    setenv("FAKE_DRIVER_FINDS_NO_GPU", "1", 1);
    Watch watch;
    for (const char *plan : {"/both.plan", "/unfit.plan"}) {
        a_plan_runs(folder + plan, QSM_DEVICE_AUTO, false, 1);
        a_plan_runs(folder + plan, QSM_DEVICE_CPU, false, 0);
        opened(folder + plan, QSM_DEVICE_GPU, QSM_ENGINE_ERROR, watch);
        REQUIRE(says(": the NVIDIA driver finds no GPU (no reason given); QSM_DEVICE_CPU runs"));
    }
    for (const qsm_device device : {QSM_DEVICE_AUTO, QSM_DEVICE_CPU, QSM_DEVICE_GPU}) {
        opened(folder + "/cnn.plan", device, QSM_ENGINE_ERROR, watch);
        REQUIRE(says("of the former form") == (device != QSM_DEVICE_GPU));
        REQUIRE(says("finds no GPU") == (device != QSM_DEVICE_CPU) && !says("runs its graph"));
    }
    unsetenv("FAKE_DRIVER_FINDS_NO_GPU");
}

void a_library_that_a_gpu_needs_is_missed(const std::string &folder) {
    const std::string library = std::getenv("QSM_CUDA_LIBRARY");
    setenv("QSM_CUDA_LIBRARY", "/nowhere/libqsm_cuda.so", 1);
    Watch watch;
    for (const qsm_device device : {QSM_DEVICE_AUTO, QSM_DEVICE_GPU}) {
        opened(folder + "/both.plan", device, QSM_ENGINE_ERROR, watch);
        REQUIRE(says("/nowhere/libqsm_cuda.so cannot be loaded"));
    }
    a_plan_runs(folder + "/both.plan", QSM_DEVICE_CPU, false, 0);
    setenv("QSM_CUDA_LIBRARY", library.c_str(), 1);
}

void on_a_gpu_the_engine_in_a_plan_runs(const std::string &folder) {
    a_plan_runs(folder + "/both.plan", QSM_DEVICE_AUTO, true, 0);
    a_plan_runs(folder + "/both.plan", QSM_DEVICE_GPU, true, 0);
    a_plan_runs(folder + "/both.plan", QSM_DEVICE_CPU, false, 0);
    a_plan_runs(folder + "/unfit.plan", QSM_DEVICE_CPU, false, 0);
    Watch watch;
    for (const qsm_device device : {QSM_DEVICE_AUTO, QSM_DEVICE_GPU}) {
        opened(folder + "/unfit.plan", device, QSM_ENGINE_ERROR, watch);
        REQUIRE(says("; `qsm-run ") && says("unfit.plan FIELD --dry-run` builds it again"));
        opened(folder + "/unfit-alone.plan", device, QSM_ENGINE_ERROR, watch);
        REQUIRE(!says("--dry-run"));
    }
    opened(folder + "/cnn.onnx", QSM_DEVICE_GPU, QSM_ENGINE_ERROR, watch);
    opened(folder + "/cnn.onnx", qsm_device(3), QSM_USAGE_ERROR, watch);
    qsm_engine *none = nullptr;
    qsm_params params = qsm_default_params();
    params.device = QSM_DEVICE_GPU;
    REQUIRE(qsm_engine_open_method("tv", &params, &none) == QSM_ENGINE_ERROR && !none);
}

}  // namespace

int main(int count, char **arguments) {
    const std::string folder = arguments[1];
    without_a_gpu_the_graph_in_a_plan_runs(folder);
    a_library_that_a_gpu_needs_is_missed(folder);
    on_a_gpu_the_engine_in_a_plan_runs(folder);
    patches_of_a_local_network_make_the_whole(folder);
    both_orders_agree_and_the_map_may_lie_on_the_field(folder);
    all_storages_give_one_map(folder);
    wrong_arguments_are_refused(folder);
    it_can_be_cancelled_at_every_step(folder);
    what_goes_wrong_inside_comes_out_as_a_status(folder);
    methods_need_no_model();
    a_method_can_be_cancelled_within_its_iterations();
    wrong_methods_and_their_parameters_are_refused();
    threads_share_an_engine_or_have_their_own(folder);
    a_gpu_gives_what_the_host_gives(folder);
    a_gpu_fails_as_a_host_does(folder);
    for (int n = 2; n < count; ++n) {
        qsm_engine *engine = nullptr;
        REQUIRE(qsm_engine_open(arguments[n], nullptr, &engine) == QSM_ENGINE_ERROR);
        REQUIRE(!engine && qsm_last_error()[0] && !std::strchr(qsm_last_error(), '\n'));
        std::printf("%s\n", qsm_last_error());
    }
    return 0;
}
