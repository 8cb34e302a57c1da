// The transform as matrix products in OpenVINO; export/dipole_matmul.py writes the same into files.
#include <cmath>
#include <openvino/op/ops.hpp>
#include <openvino/runtime/core.hpp>

#include "dipole_filter.h"
#include "openvino_call.h"

namespace qsm::host {

namespace {

constexpr char kFailed[] = "OpenVINO cannot compute the dipole operator";
constexpr char kFix[] = "please report it";

using Value = ov::Output<ov::Node>;

// A complex volume or matrix.
struct Complex {
    Value re, im;
};

Value sum(const Value &a, const Value &b) { return std::make_shared<ov::op::v1::Add>(a, b); }
Value difference(const Value &a, const Value &b) {
    return std::make_shared<ov::op::v1::Subtract>(a, b);
}
Value times(const Value &a, const Value &b) { return std::make_shared<ov::op::v1::Multiply>(a, b); }
Value matmul(const Value &a, const Value &b, bool transposed = false) {
    return std::make_shared<ov::op::v0::MatMul>(a, b, false, transposed);
}
Value reshaped(const Value &x, const std::vector<int64_t> &shape) {
    const auto sizes = ov::op::v0::Constant::create(ov::element::i64, {shape.size()}, shape);
    return std::make_shared<ov::op::v1::Reshape>(x, sizes, false);
}

// cos and sin of 2 pi i k / n for n voxels i and the first `count` frequencies k.
Complex waves(int32_t n, int32_t count) {
    std::vector<float> cosines, sines;
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t k = 0; k < count; ++k) {
            const double angle = 2 * std::acos(-1.0) * double(i * k % n) / n;
            cosines.push_back(float(std::cos(angle)));
            sines.push_back(float(std::sin(angle)));
        }
    }
    const ov::Shape shape{size_t(n), size_t(count)};
    return {ov::op::v0::Constant::create(ov::element::f32, shape, cosines),
            ov::op::v0::Constant::create(ov::element::f32, shape, sines)};
}

// Transforms the axis before the last.
Complex forward(const Complex &waves, const Complex &x) {
    return {sum(matmul(waves.re, x.re), matmul(waves.im, x.im)),
            difference(matmul(waves.re, x.im), matmul(waves.im, x.re))};
}

// Transforms the axis before the last back.
Complex inverse(const Complex &waves, const Complex &x) {
    return {difference(matmul(waves.re, x.re), matmul(waves.im, x.im)),
            sum(matmul(waves.re, x.im), matmul(waves.im, x.re))};
}

Complex reshaped(const Complex &x, const std::vector<int64_t> &shape) {
    return {reshaped(x.re, shape), reshaped(x.im, shape)};
}

std::shared_ptr<ov::Model> product_model(const Shape &shape) {
    const int64_t nx = shape[0], ny = shape[1], nz = shape[2], half = nz / 2 + 1;
    const ov::Shape whole{size_t(nx), size_t(ny), size_t(nz)};
    const auto x = std::make_shared<ov::op::v0::Parameter>(ov::element::f32, whole);
    const auto e = std::make_shared<ov::op::v0::Parameter>(
        ov::element::f32, ov::Shape{size_t(nx), size_t(ny * half)});
    const Complex along_x = waves(shape[0], shape[0]), along_y = waves(shape[1], shape[1]),
                  along_z = waves(shape[2], int32_t(half));

    Complex spectrum{matmul(x, along_z.re),
                     std::make_shared<ov::op::v0::Negative>(matmul(x, along_z.im))};
    spectrum = reshaped(forward(along_y, spectrum), {nx, ny * half});
    spectrum = forward(along_x, spectrum);
    spectrum = {times(spectrum.re, e), times(spectrum.im, e)};
    spectrum = reshaped(inverse(along_x, spectrum), {nx, ny, half});
    spectrum = inverse(along_y, spectrum);
    const Value y =
        difference(matmul(spectrum.re, along_z.re, true), matmul(spectrum.im, along_z.im, true));
    return std::make_shared<ov::Model>(ov::OutputVector{y}, ov::ParameterVector{x, e});
}

class OpenVinoProduct final : public SpectralProduct {
  public:
    OpenVinoProduct(const Shape &shape, int threads)
        : request_(core_.compile_model(product_model(shape), "CPU", openvino_settings(threads))
                       .create_infer_request()),
          x_shape_(request_.get_input_tensor(0).get_shape()),
          e_shape_(request_.get_input_tensor(1).get_shape()) {}

    void apply(const float *x, const float *e, float *y) override {
        openvino_call(kFailed, kFix, [&] {
            set(0, x_shape_, x);
            set(1, e_shape_, e);
            request_.infer();
        });
        const ov::Tensor output = request_.get_output_tensor();
        std::copy_n(output.data<const float>(), output.get_size(), y);
    }

  private:
    // Inputs are only read; ov::Tensor has no form for that.
    void set(size_t index, const ov::Shape &shape, const float *data) {
        request_.set_input_tensor(index,
                                  ov::Tensor(ov::element::f32, shape, const_cast<float *>(data)));
    }

    ov::Core core_;
    ov::InferRequest request_;
    const ov::Shape x_shape_, e_shape_;
};

}  // namespace

std::unique_ptr<SpectralProduct> open_spectral_product(const Shape &shape, int threads) {
    return openvino_call(kFailed, kFix, [&]() -> std::unique_ptr<SpectralProduct> {
        return std::make_unique<OpenVinoProduct>(shape, threads);
    });
}

}  // namespace qsm::host
