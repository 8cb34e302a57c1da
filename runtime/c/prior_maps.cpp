#include "prior_maps.h"

#include <algorithm>
#include <numeric>
#include <set>

#include "dipole_filter.h"
#include "field_noise.h"
#include "padded_box.h"
#include "total_variation.h"

namespace qsm::host {

namespace {

double noise_of(const Scan &scan, const PaddedBox &grid, int threads) {
    const double sigma = field_noise(scan, grid.box, threads);
    if (sigma > 0) return sigma;
    throw Error(QSM_DATA_ERROR,
                "the field is the same everywhere, so that no map can be told from it");
}

Volume variation_map(TotalVariation &tv, const std::string &method) {
    return method == "tv" ? tv.map() : method == "tv_field" ? tv.inner_field() : tv.residual();
}

// x after so many steps of x += M TKD(M (f - D x)) from zero.
Volume iterated_tkd(const PriorMap &prior, const Volume &field, const PaddedBox &grid, int threads,
                    const Caller &caller) {
    Fft fft(grid.geometry.shape, threads);
    const size_t row = fft.row_floats();
    const Volume inverse = half_multiplier(grid.geometry, tkd_response(*prior.threshold));
    const Volume dipole = prior.steps == 1
                              ? Volume()
                              : half_multiplier(grid.geometry, [](float d) { return d; });
    Volume chi(field.size()), left = field, work(fft.floats());
    const auto filter = [&](const Volume &x, const Volume &multiplier) {
        std::fill(work.begin(), work.end(), 0.0f);
        grid.over_mask(row, [&](size_t at, size_t padded) { work[padded] = x[at]; });
        multiply_spectrum(fft, work.data(), multiplier);
    };
    for (int64_t step = 0; step < prior.steps; ++step) {
        caller.poll();
        if (step) {
            filter(chi, dipole);
            grid.over_mask(row,
                           [&](size_t at, size_t padded) { left[at] = field[at] - work[padded]; });
        }
        filter(left, inverse);
        grid.over_mask(row, [&](size_t at, size_t padded) { chi[at] += work[padded]; });
    }
    return chi;
}

}  // namespace

Made prior_maps(const Card &card, const Scan &scan, int threads, Caller &caller) {
    const bool takes_noise =
        std::any_of(card.inputs.begin(), card.inputs.end(),
                    [](const TensorInfo &tensor) { return tensor.name == "field_noise_ppm"; });
    Made made;
    if (card.priors.empty() && !takes_noise) return made;
    const PaddedBox grid(scan);
    double sigma_ppm = 0;
    if (takes_noise || variation_steps(card)) sigma_ppm = noise_of(scan, grid, threads);
    for (const PriorMap &prior : card.priors) {
        if (made.count(prior.name)) continue;
        if (prior.is_tkd()) {
            const auto of = made.find(prior.of);
            const Volume &field = of == made.end() ? scan.local_field_ppm : of->second;
            made[prior.name] = iterated_tkd(prior, field, grid, threads, caller);
            continue;
        }
        TotalVariation tv(grid, alpha_of_noise(sigma_ppm, scan.geometry), threads);
        tv.run(int32_t(prior.steps), caller);
        for (const PriorMap &other : card.priors) {  // of the same run
            if (other.is_tkd() || other.steps != prior.steps) continue;
            made[other.name] = variation_map(tv, other.method);
        }
    }
    if (takes_noise) made["field_noise_ppm"] = {float(sigma_ppm)};
    return made;
}

// y = p + M (D TKD)^2 (y - p), both 0 outside the mask.
void anchor_map(Volume &chi, const Volume &prior, double threshold, const Scan &scan, int threads) {
    const PaddedBox grid(scan);
    Fft fft(grid.geometry.shape, threads);
    const size_t row = fft.row_floats();
    const Volume inverse = half_multiplier(grid.geometry, tkd_response(threshold));
    const Volume dipole = half_multiplier(grid.geometry, [](float d) { return d; });
    Volume change(fft.floats());
    grid.over_mask(row, [&](size_t at, size_t padded) { change[padded] = chi[at] - prior[at]; });
    for (const Volume *multiplier : {&inverse, &dipole, &inverse, &dipole}) {
        multiply_spectrum(fft, change.data(), *multiplier);
    }
    grid.over_mask(row, [&](size_t at, size_t padded) { chi[at] = prior[at] + change[padded]; });
}

int64_t variation_steps(const Card &card) {
    std::set<int64_t> runs;
    for (const PriorMap &prior : card.priors) {
        if (!prior.is_tkd()) runs.insert(prior.steps);
    }
    return std::accumulate(runs.begin(), runs.end(), int64_t{0});
}

}  // namespace qsm::host
