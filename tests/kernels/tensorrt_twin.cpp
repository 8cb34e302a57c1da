// Does with the plugin what TensorRT does, on a CPU: the host twin stands in for the GPU, TensorRT's
// own headers for its interfaces. Needs no library of TensorRT.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

#include "qsm_cuda.h"

using namespace nvinfer1;

extern "C" IPluginCreatorInterface *const *getCreators(int32_t &count);
extern "C" void setLoggerFinder(ILoggerFinder *finder);

namespace {

std::string heard;  // what the logger was told last

class Logger final : public ILogger {
    void log(Severity severity, const char *message) noexcept override {
        heard = (severity == Severity::kERROR ? "E " : "? ") + std::string(message);
    }
} logger;

class Finder final : public ILoggerFinder {
  public:
    ILogger *findLogger() override { return &logger; }
} finder;

class Recorder final : public IErrorRecorder {
  public:
    std::vector<std::string> errors;

    int32_t getNbErrors() const noexcept override { return static_cast<int32_t>(errors.size()); }
    ErrorCode getErrorCode(int32_t) const noexcept override { return ErrorCode::kFAILED_EXECUTION; }
    ErrorDesc getErrorDesc(int32_t index) const noexcept override {
        return errors[static_cast<size_t>(index)].c_str();
    }
    bool hasOverflowed() const noexcept override { return false; }
    void clear() noexcept override { errors.clear(); }
    bool reportError(ErrorCode, ErrorDesc text) noexcept override {
        errors.push_back(text);
        return true;
    }
    RefCount incRefCount() noexcept override { return 1; }
    RefCount decRefCount() noexcept override { return 1; }
};

class Context final : public IPluginResourceContext {
  public:
    Recorder recorder;

    IGpuAllocator *getGpuAllocator() const noexcept override { return nullptr; }
    IErrorRecorder *getErrorRecorder() const noexcept override {
        return const_cast<Recorder *>(&recorder);
    }
};

// A size of a network's tensor: a symbol, or a number from 0 on.
class Size final : public IDimensionExpr, private apiv::VDimensionExpr {
  public:
    int64_t value = -1;

    Size() { mImpl = this; }
    bool isConstant() const override { return value >= 0; }
    int64_t getConstantValue() const override { return value; }
    bool isSizeTensor() const override { return false; }
};

class Builder final : public IExprBuilder {};

PluginTensorDesc tensor(const std::vector<int64_t> &sizes) {
    PluginTensorDesc described{};
    described.dims.nbDims = static_cast<int32_t>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), described.dims.d);
    described.type = DataType::kFLOAT;
    described.format = TensorFormat::kLINEAR;
    return described;
}

DynamicPluginTensorDesc range(const PluginTensorDesc &smallest, const PluginTensorDesc &largest) {
    return {largest, smallest.dims, largest.dims, largest.dims};
}

bool claim(bool holds, const char *what) {
    if (!holds) heard = std::string("claim failed: ") + what;
    return holds;
}

#define CLAIM(condition) \
    if (!claim(condition, #condition)) return -1

IPluginCreatorV3One *creator() {
    setLoggerFinder(&finder);
    int32_t count = 0;
    IPluginCreatorInterface *const *const found = getCreators(count);
    return count == 1 ? static_cast<IPluginCreatorV3One *>(found[0]) : nullptr;
}

template <class Capability>
Capability *capability(IPluginV3 &plugin, PluginCapabilityType type) {
    return static_cast<Capability *>(plugin.getCapabilityInterface(type));
}

// The network's shapes and types: symbols go through, other types and formats do not.
int check_build(IPluginV3 &plugin, const PluginTensorDesc (&inputs)[3]) {
    auto *const core = capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
    auto *const build = capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    CLAIM(std::string(core->getPluginName()) == creator()->getPluginName());
    CLAIM(std::string(core->getPluginVersion()) == creator()->getPluginVersion());
    CLAIM(std::string(core->getPluginNamespace()).empty());
    CLAIM(build->getNbOutputs() == 1);

    Size unknown[5], three;
    three.value = 3;
    DimsExprs shapes[3]{}, output{};
    shapes[0].nbDims = 5;
    for (int axis = 0; axis < 5; ++axis) shapes[0].d[axis] = &unknown[axis];
    for (int vector : {1, 2}) {
        shapes[vector].nbDims = 1;
        shapes[vector].d[0] = &three;
    }
    Builder builder;
    CLAIM(build->getOutputShapes(shapes, 3, nullptr, 0, &output, 1, builder) == 0);
    CLAIM(output.nbDims == 5);
    for (int axis = 0; axis < 5; ++axis) CLAIM(output.d[axis] == &unknown[axis]);
    three.value = 4;
    CLAIM(build->getOutputShapes(shapes, 3, nullptr, 0, &output, 1, builder) != 0);
    CLAIM(heard.find("voxel_size_mm must have the shape (3)") != std::string::npos);

    DataType types[3] = {DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT}, type{};
    CLAIM(build->getOutputDataTypes(&type, 1, types, 3) == 0 && type == DataType::kFLOAT);
    for (int position = 0; position < 4; ++position) {
        DynamicPluginTensorDesc all[4];
        for (int index = 0; index < 4; ++index) all[index].desc = inputs[index % 3];
        CLAIM(build->supportsFormatCombination(position, all, 3, 1));
        all[position].desc.type = DataType::kHALF;
        CLAIM(!build->supportsFormatCombination(position, all, 3, 1));
        all[position].desc.type = DataType::kFLOAT;
        all[position].desc.format = TensorFormat::kCHW32;
        CLAIM(!build->supportsFormatCombination(position, all, 3, 1));
    }
    return 0;
}

}  // namespace

extern "C" {

QSM_CUDA_API const char *tensorrt_twin_heard(void) { return heard.c_str(); }

// Builds, serialises, loads and runs a network of one node. `sizes` and `smallest` are x's; the
// workspace is allocated as asked for, aligned as TensorRT does.
QSM_CUDA_API int tensorrt_twin_run(const char *multiplier, const float *threshold,
                                   const float *lambda, const int64_t *smallest,
                                   const int64_t *sizes, const float *const *inputs, float *y) {
    heard.clear();
    const PluginField given[] = {
        {"multiplier", multiplier, PluginFieldType::kCHAR,
         static_cast<int32_t>(std::string(multiplier).size())},
        {"threshold", threshold, PluginFieldType::kFLOAT32, 1},
        {"lambda", lambda, PluginFieldType::kFLOAT32, 1}};
    const PluginFieldCollection fields{3, given};
    CLAIM(creator() && creator()->getFieldNames()->nbFields == 3);
    std::unique_ptr<IPluginV3> made(
        creator()->createPlugin("node", &fields, TensorRTPhase::kBUILD));
    if (!made) return -2;

    const PluginTensorDesc described[] = {tensor({sizes, sizes + 5}), tensor({3}), tensor({3})};
    if (check_build(*made, described)) return -1;
    std::unique_ptr<IPluginV3> built(made->clone());
    auto *const build = capability<IPluginV3OneBuild>(*built, PluginCapabilityType::kBUILD);
    const DynamicPluginTensorDesc ranges[] = {
        range(tensor({smallest, smallest + 5}), described[0]), range(described[1], described[1]),
        range(described[2], described[2])};
    if (const int status = build->configurePlugin(ranges, 3, ranges, 1)) return status;
    const size_t bytes = build->getWorkspaceSize(ranges, 3, ranges, 1);
    auto *const runtime = capability<IPluginV3OneRuntime>(*built, PluginCapabilityType::kRUNTIME);
    std::unique_ptr<IPluginV3> loaded(creator()->createPlugin(
        "node", runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    made.reset();
    built.reset();

    Context context;
    std::unique_ptr<IPluginV3> attached(
        capability<IPluginV3OneRuntime>(*loaded, PluginCapabilityType::kRUNTIME)
            ->attachToContext(&context));
    loaded.reset();
    auto *const run = capability<IPluginV3OneRuntime>(*attached, PluginCapabilityType::kRUNTIME);
    std::unique_ptr<void, decltype(&std::free)> workspace(
        std::aligned_alloc(256, (bytes + 255) / 256 * 256), &std::free);
    const void *const read[] = {inputs[0], inputs[1], inputs[2]};
    void *const written[] = {y};
    CLAIM(run->enqueue(described, described, read, written, workspace.get(), nullptr) ==
          QSM_CUDA_NOT_PREPARED);
    CLAIM(context.recorder.errors.size() == 1);
    CLAIM(context.recorder.errors[0].find("another shape") != std::string::npos);
    // The smallest shape first: its plans must not be those of the next.
    for (const PluginTensorDesc &x : {tensor({smallest, smallest + 5}), described[0]}) {
        const PluginTensorDesc shapes[] = {x, described[1], described[2]};
        if (const int status = run->onShapeChange(shapes, 3, &x, 1)) {
            return context.recorder.errors.size() == 2 ? status : -1;
        }
    }
    return run->enqueue(described, described, read, written, workspace.get(), nullptr);
}
}
