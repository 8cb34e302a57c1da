// The C functions: arguments are checked here, and nothing but a status leaves.
#include "qsm_runtime.h"

#include <mutex>

#include "error.h"
#include "reconstruct.h"
#include "scan.h"
#include "session.h"

using namespace qsm::host;

struct qsm_engine {
    std::unique_ptr<Session> session;
    int threads;
    std::mutex in_use;
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
        opened->session = open_onnx_session(path, params.threads);
        const Card &card = opened->session->card();
        Caller(params).log(QSM_LOG_INFO, std::string(path) + ": " + card.network + ", " +
                                             card.precision + ", on " + opened->session->backend());
        *engine = opened.release();
    });
}

const char *qsm_engine_card(const qsm_engine *engine) {
    return engine ? engine->session->card().json.c_str() : nullptr;
}

qsm_status qsm_reconstruct(qsm_engine *engine, const qsm_scan *scan, const qsm_params *given,
                           float *chi_ppm) {
    return guarded([&] {
        require_pointer("engine", engine);
        require_pointer("scan", scan);
        require_pointer("chi_ppm", chi_ppm);
        const qsm_params params = checked(given);
        const auto order = static_cast<qsm_memory_order>(params.memory_order);
        Scan copy = scan_from(*scan, order);
        const std::lock_guard<std::mutex> lock(engine->in_use);
        const Volume chi = reconstruct(*engine->session, copy, params, engine->threads);
        store(chi, copy.geometry.shape, order, chi_ppm);
    });
}

qsm_status qsm_reconstruct_device(qsm_engine *, const qsm_scan *, const qsm_params *, float *,
                                  void *) {
    return guarded([] {
        throw Error(QSM_ENGINE_ERROR, "this library was built without TensorRT and CUDA");
    });
}

void qsm_engine_close(qsm_engine *engine) { delete engine; }
