// Takes the inference engine's place in tests of all other code: a model is a card in a file, its
// network doubles the last volume it takes, and the transform is the textbook's.
#include <cmath>
#include <complex>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>

#include "device_session.h"
#include "dipole_filter.h"
#include "error.h"
#include "session.h"

namespace qsm::host {

namespace {

// What a card's option `fake` says goes wrong or differs.
std::string behaviour(const Card &card) {
    const auto option = card.options.find("fake");
    return option == card.options.end() ? "" : option->second;
}

Card card_in(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    return read_card(path, {std::istreambuf_iterator<char>(file), {}});
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
    explicit FakeSession(const std::string &path) { card_ = card_in(path); }

    const char *backend() const override { return "openvino"; }

    const float *run(const std::vector<Tensor> &inputs) override {
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
    explicit FakePlan(const std::string &path) { card_ = card_in(path); }

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

using Wave = std::complex<double>;

class FakeProduct final : public SpectralProduct {
  public:
    explicit FakeProduct(const Shape &shape) : shape_(shape) {}

    void apply(const float *x, const float *e, float *y) override {
        std::vector<Wave> grid(x, x + Geometry::voxels_of(shape_));
        for (size_t axis = 0; axis < 3; ++axis) transform(grid, axis, -1);
        const int32_t half = shape_[2] / 2 + 1;
        for (int32_t row = 0; row < shape_[0] * shape_[1]; ++row) {
            for (int32_t z = 0; z < shape_[2]; ++z) {
                // The other half is not needed: what is real is twice the real part of the first.
                grid[size_t(row) * size_t(shape_[2]) + size_t(z)] *=
                    z < half ? double(e[size_t(row) * size_t(half) + size_t(z)]) : 0.0;
            }
        }
        for (size_t axis = 0; axis < 3; ++axis) transform(grid, axis, 1);
        for (size_t n = 0; n < grid.size(); ++n) y[n] = float(grid[n].real());
    }

  private:
    void transform(std::vector<Wave> &grid, size_t axis, double sign) const {
        const size_t n = size_t(shape_[axis]);
        const size_t strides[] = {size_t(shape_[1]) * size_t(shape_[2]), size_t(shape_[2]), 1};
        std::vector<Wave> line(n), waves(n);
        for (size_t i = 0; i < n; ++i) {
            waves[i] = std::polar(1.0, sign * 2 * std::acos(-1.0) * double(i) / double(n));
        }
        for (size_t first = 0; first < grid.size(); ++first) {
            if (first / strides[axis] % n != 0) continue;
            for (size_t i = 0; i < n; ++i) line[i] = grid[first + i * strides[axis]];
            for (size_t k = 0; k < n; ++k) {
                Wave sum = 0;
                for (size_t i = 0; i < n; ++i) sum += line[i] * waves[i * k % n];
                grid[first + k * strides[axis]] = sum;
            }
        }
    }

    const Shape shape_;
};

}  // namespace

std::unique_ptr<Session> open_onnx_session(const std::string &path, int) {
    return std::make_unique<FakeSession>(path);
}

std::unique_ptr<SpectralProduct> open_spectral_product(const Shape &shape, int) {
    return std::make_unique<FakeProduct>(shape);
}

#ifndef QSM_TENSORRT_PLANS
std::unique_ptr<DeviceSession> open_plan_session(const std::string &path) {
    return std::make_unique<FakePlan>(path);
}
#endif

}  // namespace qsm::host
