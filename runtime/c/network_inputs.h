// What a network takes: volumes of the scan's grid, and numbers.
#ifndef QSM_RUNTIME_NETWORK_INPUTS_H
#define QSM_RUNTIME_NETWORK_INPUTS_H

#include <string>
#include <vector>

#include "card.h"
#include "request.h"
#include "scan.h"

namespace qsm::host {

// Returns the values of each input of a card, in order; none for the field, which the scan holds,
// unless its sign is another.
// What is made of the field for it are steps of the caller's.
std::vector<Volume> network_inputs(const Card &card, const Scan &scan, int threads,
                                   Caller &caller);

// Returns what a network wants its field multiplied with.
double field_sign(const Card &card);

// Returns which input a name is.
size_t input_index(const Card &card, const std::string &name);

// Returns the shape in which an input of this name is taken, with patches of a size.
std::vector<size_t> input_shape(const std::string &name, const Shape &patch);

}  // namespace qsm::host

#endif
