// The C functions: arguments are checked here, and nothing but a status leaves.
#include "qsm_runtime.h"

#include <mutex>

#include "device_session.h"
#include "error.h"
#include "gpu.h"
#include "method.h"
#include "plan_file.h"
#include "reconstruct.h"
#include "request.h"
#include "scan.h"
#include "session.h"

using namespace qsm::host;

struct qsm_engine {
    std::unique_ptr<Session> on_cpu;  // one of these two, or a method
    std::unique_ptr<DeviceSession> on_gpu;
    Method method = Method::kNone;
    void *context = nullptr;  // that of the GPU
    int threads = 0;
    std::mutex in_use;

    const Card &card() const { return on_cpu ? on_cpu->card() : on_gpu->card(); }

    FieldKind takes() const {
        const bool total = method == Method::kNone && card().inputs[0].name == "total_field_ppm";
        return total ? FieldKind::kTotal : FieldKind::kLocal;
    }

    Layout layout(const qsm_scan &scan, const qsm_params &params) const {
        const Axes canonical = canonical_axes(params.axes, scan.b0_direction);
        return {static_cast<qsm_memory_order>(params.memory_order),
                method == Method::kNone ? canonical.then(axes_named(card().axes)) : canonical};
    }
};

namespace {

qsm_params checked(const qsm_params *params) {
    if (!params) return qsm_default_params();
    if (params->struct_size != sizeof(qsm_params)) {
        throw Error(QSM_USAGE_ERROR,
                    text("params.struct_size is %zu, this library's is %zu: make params with "
                         "qsm_default_params(), and compile with this library's header",
                         params->struct_size, sizeof(qsm_params)));
    }
    require_params(*params);
    return *params;
}

void require_pointer(const char *name, const void *pointer) {
    if (!pointer) throw Error(QSM_USAGE_ERROR, std::string(name) + " is a null pointer");
}

void open_on_gpu(qsm_engine &engine, const std::string &path, const PlanFile &plan) {
    try {
        engine.on_gpu = open_engine_session(path, plan.engine);
        engine.context = Gpu::get().context();
    } catch (const Unfit &unfit) {
        if (!plan.graph) throw;
        throw Unfit(unfit.what() + ("; `qsm-run " + path) +
                    " FIELD --dry-run` builds it again for this GPU and says where: open that "
                    "plan, or set params.device to QSM_DEVICE_CPU");
    }
}

// The engine in a plan, or the graph behind it where there is no GPU and none was asked for.
void open_plan(qsm_engine &engine, const std::string &path, const qsm_params &params) {
    const PlanFile plan = read_plan(path);
    std::string why;
    if (params.device != QSM_DEVICE_CPU) {
        try {
            return open_on_gpu(engine, path, plan);
        } catch (const NoGpu &none) {
            why = none.what();
        }
        if (params.device == QSM_DEVICE_GPU) {
            throw NoGpu(path + ": " + why +
                        (plan.graph ? "; QSM_DEVICE_CPU runs its graph on the CPU" : ""));
        }
    }
    if (!plan.graph) {
        const Error error = no_graph(path, plan.engine);
        throw why.empty() ? error : Error(error.status, error.what() + ("; " + why));
    }
    engine.on_cpu = open_onnx_session(path, *plan.graph, params.threads);
    require_same_network(path, plan.engine, engine.card());
    if (why.empty()) return;
    Caller(params).log(QSM_LOG_WARNING,
                       path + ": " + why + "; its " + engine.card().precision +
                           " graph runs on the CPU instead, in " + engine.on_cpu->backend() +
                           ", computed in " + engine.on_cpu->precision());
}

// An engine for the CPU alone.
void require_no_gpu_asked_for(const qsm_params &params, const std::string &what) {
    if (params.device != QSM_DEVICE_GPU) return;
    throw Error(QSM_ENGINE_ERROR, what + " on the CPU only, and params.device is QSM_DEVICE_GPU; "
                                         "open a .plan, or leave it QSM_DEVICE_AUTO");
}

}  // namespace

const char *qsm_version(void) { return QSM_RUNTIME_VERSION; }

qsm_params qsm_default_params(void) {
    qsm_params params{};
    params.struct_size = sizeof params;
    params.patch = QSM_PATCH_AUTO;
    params.overlap = QSM_OVERLAP_AUTO;
    return params;
}

qsm_status qsm_engine_open(const char *path, const qsm_params *given, qsm_engine **engine) {
    if (engine) *engine = nullptr;
    return guarded([&] {
        require_pointer("path", path);
        require_pointer("engine", engine);
        const qsm_params params = checked(given);
        auto opened = std::make_unique<qsm_engine>();
        opened->threads = params.threads;
        if (is_plan(path)) {
            open_plan(*opened, path, params);
        } else {
            require_no_gpu_asked_for(params, std::string(path) + ": this library runs .onnx files");
            opened->on_cpu = open_onnx_session(path, read_file(path), params.threads);
        }
        const char *backend =
            opened->on_cpu ? opened->on_cpu->backend() : opened->on_gpu->backend();
        const Card &card = opened->card();
        Caller(params).log(QSM_LOG_INFO, std::string(path) + ": " + card.network + ", " +
                                             card.precision + ", on " + backend);
        *engine = opened.release();
    });
}

qsm_status qsm_engine_open_method(const char *method, const qsm_params *given,
                                  qsm_engine **engine) {
    if (engine) *engine = nullptr;
    return guarded([&] {
        require_pointer("method", method);
        require_pointer("engine", engine);
        const qsm_params params = checked(given);
        auto opened = std::make_unique<qsm_engine>();
        opened->threads = params.threads;
        opened->method = method_of(method);
        require_no_gpu_asked_for(params, std::string(method) + " computes");
        *engine = opened.release();
    });
}

const char *qsm_engine_card(const qsm_engine *engine) {
    return engine && engine->method == Method::kNone ? engine->card().json.c_str() : nullptr;
}

qsm_status qsm_reconstruct(qsm_engine *engine, const qsm_scan *scan, const qsm_params *given,
                           float *chi_ppm) {
    return guarded([&] {
        require_pointer("engine", engine);
        require_pointer("scan", scan);
        require_pointer("chi_ppm", chi_ppm);
        const qsm_params params = checked(given);
        Scan copy = scan_from(*scan, engine->layout(*scan, params), engine->takes());
        require_params_of(engine->method, params);
        const std::lock_guard<std::mutex> lock(engine->in_use);
        if (engine->on_gpu) Gpu::get().use(engine->context);
        qsm_facts facts{};
        const auto map = [&] {
            if (engine->on_cpu) return reconstruct(*engine->on_cpu, copy, params, engine->threads);
            if (engine->on_gpu) {
                return reconstruct_on_device(*engine->on_gpu, copy, params, engine->threads,
                                             nullptr, nullptr);
            }
            return reconstruct_by(engine->method, copy, params, engine->threads, facts);
        };
        store(map(), copy, chi_ppm);
        if (params.facts) *params.facts = facts;
    });
}

qsm_status qsm_reconstruct_device(qsm_engine *engine, const qsm_scan *scan, const qsm_params *given,
                                  float *chi_ppm, void *stream) {
    return guarded([&] {
        require_pointer("engine", engine);
        require_pointer("scan", scan);
        require_pointer("chi_ppm", chi_ppm);
        const qsm_params params = checked(given);
        require_params_of(engine->method, params);
        if (!engine->on_gpu) {
            throw Error(QSM_ENGINE_ERROR,
                        "this engine computes on the CPU; open a .plan for a GPU");
        }
        if (params.memory_order != QSM_Z_FASTEST) {
            throw Error(QSM_USAGE_ERROR,
                        "a GPU takes volumes in the order QSM_Z_FASTEST only; set "
                        "memory_order");
        }
        const std::lock_guard<std::mutex> lock(engine->in_use);
        Gpu::get().use(engine->context);
        Scan copy = scan_from_device(*scan, engine->layout(*scan, params), engine->takes(), stream);
        if (copy.layout.axes == Axes{}) {
            reconstruct_on_device(*engine->on_gpu, copy, params, engine->threads, chi_ppm, stream);
        } else {
            Volume stored(copy.geometry.voxels());
            store(reconstruct_on_device(*engine->on_gpu, copy, params, engine->threads, nullptr,
                                        stream),
                  copy, stored.data());
            Gpu::get().upload(chi_ppm, stored.data(), stored.size() * sizeof(float), stream);
            Gpu::get().wait(stream);
        }
    });
}

void qsm_engine_close(qsm_engine *engine) { delete engine; }
