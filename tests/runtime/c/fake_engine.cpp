// Takes the inference engine's place in tests of all other code: a model is a card in a file, its
// network doubles the last volume it takes, and the transform is the textbook's.
#include <cmath>
#include <complex>
#include <fstream>
#include <iterator>
#include <limits>

#include "dipole_filter.h"
#include "error.h"
#include "session.h"

namespace qsm::host {

namespace {

class FakeSession final : public Session {
  public:
    explicit FakeSession(const std::string &path) {
        std::ifstream file(path, std::ios::binary);
        card_ = read_card(path, {std::istreambuf_iterator<char>(file), {}});
        const auto option = card_.options.find("fake");
        if (option != card_.options.end()) does_ = option->second;
    }

    const char *backend() const override { return "openvino"; }

    const float *run(const std::vector<Tensor> &inputs) override {
        if (does_ == "fail") throw Error(QSM_ENGINE_ERROR, "the engine fails, as the test wishes");
        if (does_ == "throw") throw std::runtime_error("a bug,\nas the test wishes");
        if (does_ == "no memory") throw std::bad_alloc();
        const Tensor *last = nullptr;
        for (const Tensor &input : inputs) {
            if (input.shape.size() == 5) last = &input;
        }
        size_t voxels = 1;
        for (const size_t n : last->shape) voxels *= n;
        output_.assign(last->data, last->data + voxels);
        for (float &value : output_) value *= 2;
        if (does_ == "position") add_position(last->shape);
        if (does_ == "nan") output_.assign(voxels, std::numeric_limits<float>::quiet_NaN());
        return output_.data();
    }

  private:
    // So that it shows which patch a voxel comes from, and with which weight.
    void add_position(const std::vector<size_t> &shape) {
        for (size_t n = 0; n < output_.size(); ++n) {
            const size_t z = n % shape[4], y = n / shape[4] % shape[3], x = n / shape[4] / shape[3];
            output_[n] += 0.001f * float(x + 2 * y + 3 * z);
        }
    }

    std::string does_;
    Volume output_;
};

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

}  // namespace qsm::host
