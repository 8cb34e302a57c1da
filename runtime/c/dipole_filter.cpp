#include "dipole_filter.h"

#include "k_space.h"
#include "launch.h"
#include "patch_rows.h"

namespace qsm::host {

namespace {

// numpy.fft.fftfreq in float32.
std::vector<float> frequencies(int32_t n, double spacing) {
    std::vector<float> k(static_cast<size_t>(n));
    const double step = 1 / (n * spacing);
    for (int32_t i = 0; i < n; ++i) k[size_t(i)] = float(signed_index(i, n) * step);
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
    const double one_over_n = 1 / double(geometry.voxels());
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
                const double stands_for = z == 0 || 2 * z == shape[2] ? 1 : 2;
                e.push_back(float(symmetrised_at(f, b, g) * (stands_for * one_over_n)));
            }
        }
    }
    return e;
}

DipoleFilter::DipoleFilter(const Geometry &geometry, int32_t pad_voxels, int threads)
    : geometry_(geometry),
      padded_(geometry.padded(pad_voxels)),
      pad_voxels_(pad_voxels),
      product_(open_spectral_product(padded_.shape, threads)),
      work_(padded_.voxels()) {}

Volume DipoleFilter::apply(const Volume &volume, const Volume &multiplier) {
    const auto &n = geometry_.shape, &p = padded_.shape;
    const qsm_cuda_patch grown{
        1, {n[0], n[1], n[2]}, {-pad_voxels_, -pad_voxels_, -pad_voxels_}, {p[0], p[1], p[2]}};
    launch(Gather{grown, volume.data(), work_.data()}, p[0] * p[1], nullptr);
    product_->apply(work_.data(), multiplier.data(), work_.data());
    const qsm_cuda_patch inner{
        1, {p[0], p[1], p[2]}, {pad_voxels_, pad_voxels_, pad_voxels_}, {n[0], n[1], n[2]}};
    Volume cropped(volume.size());
    launch(Gather{inner, work_.data(), cropped.data()}, n[0] * n[1], nullptr);
    return cropped;
}

}  // namespace qsm::host
