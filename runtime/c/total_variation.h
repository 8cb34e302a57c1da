// Of all maps that explain a field the one with the least edges, by ADMM; see
// kernels/inversion/total_variation.py, whose equations and names these are.
#ifndef QSM_RUNTIME_TOTAL_VARIATION_H
#define QSM_RUNTIME_TOTAL_VARIATION_H

#include "fft.h"
#include "padded_box.h"
#include "request.h"
#include "scan.h"

namespace qsm::host {

constexpr double kTvBytes = 35;  // of a padded voxel: eight volumes, half of D, and what lies where

class TotalVariation {
  public:
    TotalVariation(const PaddedBox &grid, double alpha_ppm_mm, int threads);

    // Makes so many iterations, the first from a masked TKD map.
    void run(int32_t iterations, Caller &caller);

    // |x - x_before| / |x| of the last iteration.
    double last_change() const;

    // On the scan's grid, 0 outside the mask M: the map x, what of the field f it does not explain,
    // M (f - D x), and the field without what its sources outside the mask do, M (f - D (x - M x)).
    Volume map() const;
    Volume residual() const;
    Volume inner_field();  // after last_change()

  private:
    void start();
    void update_gradients(int32_t plane, float limit);
    void ask(int32_t plane, float limit);
    void solve(int32_t y, int32_t z, int32_t count, const Lines *spectra) const;
    template <class Value>
    Volume in_mask(Value &&value) const;

    const PaddedBox &grid_;
    Fft fft_;
    const size_t row_, plane_;  // [floats]
    Volume d_;
    Volume laplacian_[3];        // terms of L along the axes
    Volume field_;
    const std::vector<uint8_t> place_;
    Volume x_, b_, q2_, q3_;
    Volume v_[3];  // G x + s1, before s1 is clipped out of it
    float limit_, mu1_;
};

}  // namespace qsm::host

#endif
