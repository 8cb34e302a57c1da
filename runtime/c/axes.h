// Canonical axes: the order in which everything computes, as runtime/scan/axes.py has it.
#ifndef QSM_RUNTIME_AXES_H
#define QSM_RUNTIME_AXES_H

#include <array>
#include <string>

namespace qsm::host {

// A signed permutation: how axes are made of those that a volume is stored in.
struct Axes {
    std::array<size_t, 3> order{0, 1, 2};  // which stored axis becomes x, y and z
    std::array<bool, 3> flipped{};         // whether it runs the other way then

    // What turning once more makes of these.
    Axes then(const Axes &after) const;

    // How the stored axes are made of these.
    Axes inverse() const;

    bool operator==(const Axes &other) const {
        return order == other.order && flipped == other.flipped;
    }
};

// Axes by the ends that they run to, such as LPS, made of RAS. Throws a usage error if they are no
// three ends of three different axes.
Axes axes_named(const std::string &letters);

// The canonical axes of a volume whose axes run to these ends; without letters as if to RAS, so
// that nothing is flipped. `b0` is in stored axes, of any sign and length.
Axes canonical_axes(const std::string &letters, const double (&b0)[3]);

}  // namespace qsm::host

#endif
