#include "dipole_filter.h"

#include <algorithm>

#include "k_space.h"

namespace qsm::host {

namespace {

std::vector<float> frequencies(int32_t n, double spacing) {
    std::vector<float> k;
    for (int32_t i = 0; i < n; ++i) k.push_back(float(frequency(i, n, spacing)));
    return k;
}

// How the frequency at an index and that at its negative lie on the three axes.
struct Frequency {
    float at_k[3], at_minus_k[3];
    bool differ;  // in more than the sign
};

float dipole_at(const float (&k)[3], const float (&b)[3]) {
    const float squared = k[0] * k[0] + k[1] * k[1] + k[2] * k[2];
    if (squared == 0) return 0;
    const float along_b = k[0] * b[0] + k[1] * b[1] + k[2] * b[2];
    return 1.0f / 3 - along_b * along_b / squared;
}

float symmetrised_at(const Frequency &f, const float (&b)[3], const Response &g) {
    const float e = g(dipole_at(f.at_k, b));
    return f.differ ? (e + g(dipole_at(f.at_minus_k, b))) * 0.5f : e;
}

}  // namespace

double frequency(int32_t i, int32_t n, double spacing) {
    return signed_index(i, n) * (1 / (n * spacing));
}

Response tkd_response(double threshold) {
    return Multiplier{QSM_CUDA_TKD, static_cast<float>(threshold)};
}

Volume half_multiplier(const Geometry &geometry, const Response &g) {
    const Shape &shape = geometry.shape;
    const int32_t half = shape[2] / 2 + 1;
    const double *mm = geometry.voxel_size_mm, *direction = geometry.b0_direction;
    const std::vector<float> kx = frequencies(shape[0], mm[0]), ky = frequencies(shape[1], mm[1]),
                             kz = frequencies(shape[2], mm[2]);
    const float b[] = {float(direction[0]), float(direction[1]), float(direction[2])};
    Volume e;
    e.reserve(size_t(shape[0]) * size_t(shape[1]) * size_t(half));
    // The opposite of a Nyquist frequency is itself.
    const auto opposite = [](float k, int32_t i, int32_t n) { return 2 * i == n ? k : -k; };
    for (int32_t x = 0; x < shape[0]; ++x) {
        for (int32_t y = 0; y < shape[1]; ++y) {
            for (int32_t z = 0; z < half; ++z) {
                const float at[] = {kx[size_t(x)], ky[size_t(y)], kz[size_t(z)]};
                const bool nyquist = 2 * x == shape[0] || 2 * y == shape[1] || 2 * z == shape[2];
                const Frequency f{{at[0], at[1], at[2]},
                                  {opposite(at[0], x, shape[0]), opposite(at[1], y, shape[1]),
                                   opposite(at[2], z, shape[2])},
                                  nyquist};
                e.push_back(symmetrised_at(f, b, g));
            }
        }
    }
    return e;
}

void multiply_spectrum(Fft &fft, float *x, const Volume &e) {
    const auto ny = size_t(fft.shape()[1]), half = size_t(fft.half());
    const float one_over_n = 1 / float(Geometry::voxels_of(fft.shape()));
    fft.forward_planes(x);
    fft.over_columns({x}, [&](int32_t y, int32_t z, int32_t count, const Lines *spectrum) {
        for (int32_t n = 0; n < fft.shape()[0]; ++n) {
            const float *e_at = e.data() + (size_t(n) * ny + size_t(y)) * half + size_t(z);
            float *re = spectrum->re + n * kLanes, *im = spectrum->im + n * kLanes;
            for (int32_t lane = 0; lane < count; ++lane) {
                const float factor = e_at[lane] * one_over_n;
                re[lane] *= factor;
                im[lane] *= factor;
            }
        }
    });
    fft.inverse_planes(x);
}

DipoleFilter::DipoleFilter(const Geometry &geometry, int32_t pad_voxels, int threads)
    : geometry_(geometry),
      padded_(geometry.padded(pad_voxels)),
      pad_voxels_(pad_voxels),
      fft_(padded_.shape, threads),
      work_(fft_.floats()) {}

Volume DipoleFilter::apply(const Volume &volume, const Volume &multiplier) {
    const auto &n = geometry_.shape;
    const auto nz = size_t(n[2]);
    const auto over_rows = [&](auto &&body) {
        for (int32_t x = 0; x < n[0]; ++x) {
            for (int32_t y = 0; y < n[1]; ++y) {
                body((size_t(x) * size_t(n[1]) + size_t(y)) * nz,
                     size_t(x + pad_voxels_) * fft_.plane_floats() +
                         size_t(y + pad_voxels_) * fft_.row_floats() + size_t(pad_voxels_));
            }
        }
    };
    std::fill(work_.begin(), work_.end(), 0.0f);
    over_rows([&](size_t at, size_t padded) { std::copy_n(&volume[at], nz, &work_[padded]); });
    multiply_spectrum(fft_, work_.data(), multiplier);
    Volume cropped(volume.size());
    over_rows([&](size_t at, size_t padded) { std::copy_n(&work_[padded], nz, &cropped[at]); });
    return cropped;
}

}  // namespace qsm::host
