// The maps that a network's card asks for, made of the whole volume, so that patches equal it; see
// runtime/reconstruction/prior_maps.py.
#ifndef QSM_RUNTIME_PRIOR_MAPS_H
#define QSM_RUNTIME_PRIOR_MAPS_H

#include <map>
#include <string>

#include "card.h"
#include "request.h"
#include "scan.h"

namespace qsm::host {

// What is made of a field, by name: volumes [ppm] on the scan's grid, 0 outside the mask, and
// numbers.
using Made = std::map<std::string, Volume>;

// Makes a card's prior maps, and the field's noise if the network takes it. Each iteration of total
// variation is a step of the caller's. Throws a data error if a noise is needed and the field is
// the same everywhere.
Made prior_maps(const Card &card, const Scan &scan, int threads, Caller &caller);

// Moves a map on the scan's grid back to a prior map next to the magic cone.
void anchor_map(Volume &chi, const Volume &prior, double threshold, const Scan &scan, int threads);

// Returns how many iterations of total variation they take.
int64_t variation_steps(const Card &card);

}  // namespace qsm::host

#endif
