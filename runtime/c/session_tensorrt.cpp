// Plans in TensorRT. Its library is looked for when a plan is opened: of TensorRT only the headers
// are needed to build this, and they decide the major version. Compiled and run against a made-up
// engine, never run on a GPU.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>

#include "device_session.h"
#include "error.h"
#include "gpu.h"

namespace qsm::host {

namespace {

using namespace nvinfer1;

constexpr int32_t kProfile = 0;  // a plan of qsm-export has one
constexpr char kPlugin[] = "libqsm_tensorrt.so";

// Keeps the first error since it was asked last: what follows is mostly its consequence.
class Log final : public ILogger {
  public:
    void log(Severity severity, const char *message) noexcept override {
        if (severity > Severity::kERROR || !reason_.empty()) return;
        try {
            reason_ = message;
        } catch (...) {  // no memory: no reason
        }
    }

    std::string reason() {
        const std::string said = reason_.empty() ? "it gives no reason" : reason_;
        reason_.clear();
        return said;
    }

  private:
    std::string reason_;
};

IRuntime *make_runtime(Log &log) {
    Gpu::get();  // without one TensorRT ends the process
    const std::string name = "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR);
    void *library = dlopen(name.c_str(), RTLD_NOW | RTLD_GLOBAL);
    if (!library) {
        const char *why = dlerror();
        throw Error(QSM_ENGINE_ERROR, name + ", TensorRT's library, cannot be loaded (" +
                                          (why ? why : "no reason given") +
                                          "); put it on the library path, or set params.device to "
                                          "QSM_DEVICE_CPU");
    }
    const auto create =
        reinterpret_cast<void *(*)(void *, int32_t)>(dlsym(library, "createInferRuntime_INTERNAL"));
    if (!create) throw Error(QSM_ENGINE_ERROR, name + " is no runtime of TensorRT");
    if (void *runtime = create(&log, NV_TENSORRT_VERSION)) return static_cast<IRuntime *>(runtime);
    throw Error(QSM_ENGINE_ERROR, "TensorRT does not start: " + log.reason());
}

Dims dims_of(const std::vector<size_t> &shape) {
    Dims dims{};
    dims.nbDims = static_cast<int32_t>(shape.size());
    for (size_t axis = 0; axis < shape.size(); ++axis) {
        dims.d[axis] = static_cast<std::remove_reference_t<decltype(dims.d[0])>>(shape[axis]);
    }
    return dims;
}

class TensorRtSession final : public DeviceSession {
  public:
    TensorRtSession(const std::string &path, const std::string &data)
        : runtime_(make_runtime(log_)) {
        runtime_->setEngineHostCodeAllowed(true);  // plans for later versions bring what runs them
        if (data.find(kPluginOption) != std::string::npos) load_plugin(path);
        engine_.reset(runtime_->deserializeCudaEngine(data.data(), data.size()));
        if (!engine_) {
            throw Unfit(path +
                        ": TensorRT cannot load it; it may be damaged, or built for another "
                        "version or GPU: " +
                        log_.reason());
        }
        card_ = read_card(path, engine_->getName());
        require_tensors(path);
        context_.reset(
            engine_->createExecutionContext(ExecutionContextAllocationStrategy::kUSER_MANAGED));
        if (!context_) throw Unfit(path + ": TensorRT cannot make a context: " + log_.reason());
    }

    const char *backend() const override { return "tensorrt"; }

    std::optional<size_t> scratch_bytes(const std::vector<Tensor> &inputs) override {
        for (const Tensor &input : inputs) {
            if (!serves(input)) return std::nullopt;
        }
        set_shapes(inputs);
        return context_->updateDeviceMemorySizeForShapes();
    }

    void enqueue(const std::vector<Tensor> &inputs, float *output, void *scratch,
                 void *stream) override {
        set_shapes(inputs);
        const size_t bytes = context_->updateDeviceMemorySizeForShapes();
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR > 0
        context_->setDeviceMemoryV2(scratch, static_cast<int64_t>(bytes));
#else
        static_cast<void>(bytes);
        context_->setDeviceMemory(scratch);
#endif
        for (const Tensor &input : inputs) {
            if (!context_->setInputTensorAddress(input.name.c_str(), input.data)) {
                throw failed("TensorRT refuses the address of " + input.name);
            }
        }
        const Dims shape = context_->getTensorShape(card_.output.name.c_str());
        const int32_t axes = std::max(shape.nbDims, 0);  // -1: the engine cannot tell
        require_output(card_, inputs[0].shape, {shape.d, shape.d + axes}, "f32");
        if (!context_->setTensorAddress(card_.output.name.c_str(), output)) {
            throw failed("TensorRT refuses the address of its output");
        }
        if (!context_->enqueueV3(static_cast<cudaStream_t>(stream))) {
            throw failed("TensorRT cannot run the plan");
        }
    }

  private:
    static constexpr char kPluginOption[] = "\"dipole_op\":\"plugin\"";  // of the canonical card

    Error failed(const std::string &what) {
        return {QSM_ENGINE_ERROR, what + ": " + log_.reason()};
    }

    void load_plugin(const std::string &path) {
        if (runtime_->getPluginRegistry().loadLibrary(kPlugin)) return;
        throw failed(path + ": needs the plugin " + kPlugin +
                     ", which cannot be loaded; build it (docs/tensorrt-plugin.md) and put it on "
                     "the library path");
    }

    void require_tensors(const std::string &path) const {
        std::vector<std::string> inputs, outputs;
        for (int32_t n = 0; n < engine_->getNbIOTensors(); ++n) {
            const char *name = engine_->getIOTensorName(n);
            const bool is_input = engine_->getTensorIOMode(name) == TensorIOMode::kINPUT;
            (is_input ? inputs : outputs).emplace_back(name);
            if (engine_->getTensorDataType(name) != DataType::kFLOAT) {
                throw Error(QSM_ENGINE_ERROR,
                            path + ": " + name + " is not float32; export it again");
            }
        }
        require_names(path, card_, inputs, outputs);
    }

    bool serves(const Tensor &input) const {
        const char *name = input.name.c_str();
        const Dims least = engine_->getProfileShape(name, kProfile, OptProfileSelector::kMIN);
        const Dims most = engine_->getProfileShape(name, kProfile, OptProfileSelector::kMAX);
        const Dims fixed = engine_->getTensorShape(name);
        const Dims wanted = dims_of(input.shape);
        if (fixed.nbDims != wanted.nbDims) return false;
        const bool free = least.nbDims == wanted.nbDims && most.nbDims == wanted.nbDims;
        for (int32_t axis = 0; axis < wanted.nbDims; ++axis) {
            const auto low = free ? least.d[axis] : fixed.d[axis];
            const auto high = free ? most.d[axis] : fixed.d[axis];
            if (wanted.d[axis] < low || wanted.d[axis] > high) return false;
        }
        return true;
    }

    void set_shapes(const std::vector<Tensor> &inputs) {
        for (const Tensor &input : inputs) {
            if (context_->setInputShape(input.name.c_str(), dims_of(input.shape))) continue;
            throw failed("TensorRT refuses the shape of " + input.name);
        }
    }

    Log log_;  // which must outlive the runtime, and that the engine, and that the context
    std::unique_ptr<IRuntime> runtime_;
    std::unique_ptr<ICudaEngine> engine_;
    std::unique_ptr<IExecutionContext> context_;
};

}  // namespace

std::unique_ptr<DeviceSession> open_engine_session(const std::string &path,
                                                   const std::string &engine) {
    return std::make_unique<TensorRtSession>(path, engine);
}

}  // namespace qsm::host
