// Takes the inference engine's place in tests of all other code: a model is a card in a file, and
// its network doubles the last volume it takes.
#include <cmath>
#include <cstring>
#include <limits>

#include "device_session.h"
#include "error.h"
#include "gpu.h"
#include "session.h"

namespace qsm::host {

namespace {

// What a card's option `fake` says goes wrong or differs.
std::string behaviour(const Card &card) {
    const auto option = card.options.find("fake");
    return option == card.options.end() ? "" : option->second;
}

size_t voxels_of(const Tensor &tensor) {
    size_t voxels = 1;
    for (const size_t n : tensor.shape) voxels *= n;
    return voxels;
}

// Writes twice the last volume into `output`.
void compute(const std::string &does, const std::vector<Tensor> &inputs, float *output) {
    if (does == "fail") throw Error(QSM_ENGINE_ERROR, "the engine fails, as the test wishes");
    if (does == "throw") throw std::runtime_error("a bug,\nas the test wishes");
    if (does == "no memory") throw std::bad_alloc();
    const Tensor *last = nullptr;
    for (const Tensor &input : inputs) {
        if (input.shape.size() == 5) last = &input;
    }
    const std::vector<size_t> &shape = last->shape;
    for (size_t n = 0; n < voxels_of(*last); ++n) {
        output[n] = 2 * last->data[n];
        // Shows which patch a voxel comes from, and with which weight.
        const size_t z = n % shape[4], y = n / shape[4] % shape[3], x = n / shape[4] / shape[3];
        if (does == "position") output[n] += 0.001f * float(x + 2 * y + 3 * z);
        if (does == "nan") output[n] = std::numeric_limits<float>::quiet_NaN();
    }
}

class FakeSession final : public Session {
  public:
    explicit FakeSession(Card card) { card_ = std::move(card); }

    const char *backend() const override { return "openvino"; }

    const float *run(const std::vector<Tensor> &inputs, const std::function<void()> &) override {
        output_.resize(voxels_of(inputs[0]));
        compute(behaviour(card_), inputs, output_.data());
        return output_.data();
    }

  private:
    Volume output_;
};

#ifndef QSM_TENSORRT_PLANS

// Computes at once, in what the fake driver takes for a GPU's memory.
class FakePlan final : public DeviceSession {
  public:
    explicit FakePlan(Card card) { card_ = std::move(card); }

    const char *backend() const override { return "a fake engine"; }

    std::optional<size_t> scratch_bytes(const std::vector<Tensor> &inputs) override {
        if (behaviour(card_) == "small" && voxels_of(inputs[0]) > 600) return std::nullopt;
        return kScratch;
    }

    void enqueue(const std::vector<Tensor> &inputs, float *output, void *scratch, void *) override {
        std::memset(scratch, 0xff, kScratch);
        compute(behaviour(card_), inputs, output);
    }

  private:
    static constexpr size_t kScratch = 777;
};

#endif

}  // namespace

std::unique_ptr<Session> open_onnx_session(const std::string &path, const std::string &graph, int) {
    return std::make_unique<FakeSession>(read_card(path, graph));
}

#ifndef QSM_TENSORRT_PLANS
std::unique_ptr<DeviceSession> open_engine_session(const std::string &path,
                                                   const std::string &engine) {
    Gpu::get();
    if (engine.compare(0, 5, "other") == 0) throw Unfit(path + ": for another GPU");
    return std::make_unique<FakePlan>(read_card(path, engine));
}
#endif

}  // namespace qsm::host
