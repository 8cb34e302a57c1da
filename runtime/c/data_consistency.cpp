#include "data_consistency.h"

#include "dipole_filter.h"
#include "k_space.h"

namespace qsm::host {

namespace {

double squared_norm(const Volume &v) {
    double sum = 0;
    for (const float value : v) sum += double(value) * value;
    return sum;
}

double dot(const Volume &a, const Volume &b) {
    double sum = 0;
    for (size_t n = 0; n < a.size(); ++n) sum += double(a[n]) * b[n];
    return sum;
}

void multiply(Volume &volume, const std::vector<uint8_t> &mask) {
    for (size_t n = 0; n < volume.size(); ++n) volume[n] *= float(mask[n]);
}

// a += weight b
void add(Volume &a, float weight, const Volume &b) {
    for (size_t n = 0; n < a.size(); ++n) a[n] += weight * b[n];
}

void closed_form(Volume &chi, const Scan &scan, float weight, DipoleFilter &filter) {
    chi = filter.apply(chi, filter.multiplier(Multiplier{QSM_CUDA_TIKHONOV_PRIOR, weight}));
    const Volume inverse = filter.multiplier(Multiplier{QSM_CUDA_TIKHONOV, weight});
    add(chi, 1, filter.apply(scan.local_field_ppm, inverse));
    multiply(chi, scan.mask);
}

void conjugate_gradients(Volume &chi, const Scan &scan, float weight, int32_t iterations,
                         DipoleFilter &filter, Caller &caller) {
    const Volume dipole = filter.multiplier([](float d) { return d; });
    const auto masked_dipole = [&](const Volume &x) {
        Volume field = filter.apply(x, dipole);
        multiply(field, scan.mask);
        return field;
    };
    multiply(chi, scan.mask);
    Volume r = scan.local_field_ppm;
    multiply(r, scan.mask);
    add(r, -1, masked_dipole(chi));
    r = masked_dipole(r);
    Volume direction = r;
    double squared = squared_norm(r);
    const double first = squared;
    for (int32_t n = 0; n < iterations && squared > kSolved * first; ++n) {
        caller.poll();
        Volume image = masked_dipole(masked_dipole(direction));
        add(image, weight, direction);
        const auto length = float(squared / dot(direction, image));
        add(chi, length, direction);
        add(r, -length, image);
        const double before = squared;
        squared = squared_norm(r);
        const auto ratio = float(squared / before);
        for (size_t i = 0; i < r.size(); ++i) direction[i] = direction[i] * ratio + r[i];
        caller.done();
    }
}

}  // namespace

void make_consistent(Volume &chi_ppm, const Scan &scan, double lambda, int32_t iterations,
                     int threads, Caller &caller) {
    DipoleFilter filter(scan.geometry, kCorrectionPadVoxels, threads);
    const auto weight = static_cast<float>(lambda);
    if (iterations) {
        conjugate_gradients(chi_ppm, scan, weight, iterations, filter, caller);
    } else {
        caller.poll();
        closed_form(chi_ppm, scan, weight, filter);
    }
}

}  // namespace qsm::host
