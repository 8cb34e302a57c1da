#include "axes.h"

#include <algorithm>
#include <cmath>

#include "error.h"
#include "k_space.h"

namespace qsm::host {

namespace {

const std::string kEnds[] = {"LR", "PA", "IS"};  // of each of the scanner's axes
constexpr double kTie = 1e-3;                    // between components of unit vectors

}  // namespace

Axes Axes::then(const Axes &after) const {
    Axes both;
    for (size_t n = 0; n < 3; ++n) {
        both.order[n] = order[after.order[n]];
        both.flipped[n] = flipped[after.order[n]] != after.flipped[n];
    }
    return both;
}

Axes Axes::inverse() const {
    Axes back;
    for (size_t n = 0; n < 3; ++n) {
        back.order[order[n]] = n;
        back.flipped[order[n]] = flipped[n];
    }
    return back;
}

Axes axes_named(const std::string &letters) {
    Axes axes;
    size_t found = 0;
    for (size_t place = 0; place < 3; ++place) {
        const size_t n = letters.find_first_of(kEnds[place]);
        if (n > 2) continue;
        axes.order[n] = place;
        axes.flipped[n] = letters[n] == kEnds[place][0];
        ++found;
    }
    if (found == 3 && letters.size() == 3) return axes;
    throw Error(QSM_USAGE_ERROR,
                "axes are '" + letters +
                    "', expected three letters such as RAS or LPS: the ends, one of R and L, A and "
                    "P, S and I, that x, y and z run to");
}

// Of whole axes the pairing nearest to right and front is RAS with the axis nearest to B0 in the
// place of the third.
Axes canonical_axes(const std::string &letters, const double (&b0)[3]) {
    const Axes ras = letters.empty() ? Axes{} : axes_named(letters).inverse();
    const double most = std::max({std::fabs(b0[0]), std::fabs(b0[1]), std::fabs(b0[2])});
    size_t along_b0 = 2;
    while (along_b0 && !(std::fabs(b0[ras.order[along_b0]]) >= most - kTie * norm(b0))) --along_b0;
    Axes exchanged;
    std::swap(exchanged.order[along_b0], exchanged.order[2]);
    return ras.then(exchanged);
}

}  // namespace qsm::host
