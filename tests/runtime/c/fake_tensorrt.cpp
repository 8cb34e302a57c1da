// Does as TensorRT's library does, for plans that are a card in a file: the network doubles the
// last volume it takes, in host memory. TensorRT's own headers give the interfaces;
// "tensorrt_stubs.h" has what is not called, and is made of them.
#include <NvInferRuntime.h>

#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "tensorrt_stubs.h"

using namespace nvinfer1;

namespace {

constexpr size_t kScratch = 1234;

ILogger *logger = nullptr;
int living = 0;

template <class Interface, class Stub>
class Object : public Interface, protected Stub {
  public:
    Object() {
        this->mImpl = this;
        ++living;
    }
    ~Object() override { --living; }
    Object(const Object &) = delete;
    Object &operator=(const Object &) = delete;

    Interface *getPImpl() noexcept override { return this; }
};

class Engine;

class Context final : public Object<IExecutionContext, StubExecutionContext> {
  public:
    explicit Context(const Engine &engine) : engine_(engine) {}

  private:
    bool setInputShape(char const *name, Dims const &dims) noexcept override {
        shapes_[name] = dims;
        return true;
    }
    Dims getTensorShape(char const *) const noexcept override {
        for (const auto &shape : shapes_) {
            if (shape.second.nbDims == 5) return shape.second;  // as that of the output
        }
        return {-1, {}};
    }
    size_t updateDeviceMemorySizeForShapes() noexcept override { return kScratch; }
    void setDeviceMemory(void *memory) noexcept override { scratch_ = memory; }
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR > 0
    void setDeviceMemoryV2(void *memory, int64_t size) noexcept override {
        scratch_ = size == int64_t{kScratch} ? memory : nullptr;
    }
#endif
    bool setInputTensorAddress(char const *name, void const *data) noexcept override {
        inputs_[name] = static_cast<const float *>(data);
        return true;
    }
    bool setTensorAddress(char const *, void *data) noexcept override {
        output_ = static_cast<float *>(data);
        return true;
    }
    bool enqueueV3(cudaStream_t) noexcept override;

    const Engine &engine_;
    std::map<std::string, Dims> shapes_;
    std::map<std::string, const float *> inputs_;
    void *scratch_ = nullptr;
    float *output_ = nullptr;
};

class Engine final : public Object<ICudaEngine, StubCudaEngine> {
  public:
    explicit Engine(std::string card) : card_(std::move(card)) {
        const std::string key = "\"name\":\"";
        const size_t end = card_.find("\"licence\"");  // which follows the inputs
        size_t at = card_.find("\"inputs\"");
        while ((at = card_.find(key, at)) < end) {
            at += key.size();
            names_.push_back(card_.substr(at, card_.find('"', at) - at));
        }
    }

    const std::string &last_volume() const {
        return is_number(names_.back()) ? names_.end()[-2] : names_.back();
    }
    bool says(const char *words) const { return card_.find(words) != std::string::npos; }

  private:
    char const *getName() const noexcept override { return card_.c_str(); }
    static bool is_number(const std::string &name) { return name == "field_noise_ppm"; }

    int32_t getNbIOTensors() const noexcept override { return int32_t(names_.size()) + 1; }
    char const *getIOTensorName(int32_t n) const noexcept override {
        return size_t(n) < names_.size() ? names_[size_t(n)].c_str() : "chi_ppm";
    }
    TensorIOMode getTensorIOMode(char const *name) const noexcept override {
        return std::string(name) == "chi_ppm" ? TensorIOMode::kOUTPUT : TensorIOMode::kINPUT;
    }
    DataType getTensorDataType(char const *) const noexcept override {
        return says("half") ? DataType::kHALF : DataType::kFLOAT;
    }
    Dims getTensorShape(char const *name) const noexcept override {
        if (is_number(name)) return {1, {1}};
        return {5, {-1, 1, -1, -1, -1}};
    }
    Dims getProfileShape(char const *name, int32_t,
                         OptProfileSelector which) const noexcept override {
        if (is_number(name)) return {1, {1}};
        if (which == OptProfileSelector::kMIN) return {5, {1, 1, 2, 2, 2}};
        const int most = says("small") ? 8 : 64;
        return {5, {1, 1, most, most, most}};
    }
    IExecutionContext *createExecutionContext(
        ExecutionContextAllocationStrategy strategy) noexcept override {
        if (strategy != ExecutionContextAllocationStrategy::kUSER_MANAGED) return nullptr;
        return new Context(*this);
    }

    const std::string card_;
    std::vector<std::string> names_;  // of the inputs
};

class Runtime final : public Object<IRuntime, StubRuntime> {
    ICudaEngine *deserializeCudaEngine(void const *blob, std::size_t size) noexcept override {
        const std::string card(static_cast<const char *>(blob), size);
        if (card[0] == '{') return new Engine(card);
        logger->log(ILogger::Severity::kERROR, "not a plan,\nas the test wishes");
        logger->log(ILogger::Severity::kERROR, "a consequence");
        return nullptr;
    }
    void setEngineHostCodeAllowed(bool) noexcept override {}
};

bool Context::enqueueV3(cudaStream_t) noexcept {
    if (engine_.says("fail")) {
        logger->log(ILogger::Severity::kERROR, "no kernel, as the test wishes");
        return false;
    }
    if (!scratch_) return false;
    std::memset(scratch_, 0xff, kScratch);
    const float *last = inputs_.at(engine_.last_volume());
    const Dims shape = getTensorShape("chi_ppm");
    const auto voxels = shape.d[2] * shape.d[3] * shape.d[4];
    for (int64_t n = 0; n < int64_t{voxels}; ++n) {
        output_[n] = 2 * last[n];
        if (engine_.says("nan")) output_[n] = std::numeric_limits<float>::quiet_NaN();
    }
    return true;
}

}  // namespace

extern "C" void *createInferRuntime_INTERNAL(void *given, int32_t version) noexcept {
    logger = static_cast<ILogger *>(given);
    return version == NV_TENSORRT_VERSION ? static_cast<IRuntime *>(new Runtime) : nullptr;
}

extern "C" int fake_tensorrt_living() { return living; }
