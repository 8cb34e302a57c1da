#include "network_inputs.h"

#include "prior_maps.h"

namespace qsm::host {

namespace {

// Of the scan as it is.
Volume known(const Card &card, const std::string &name, const Scan &scan) {
    const auto three = [](const double (&v)[3]) {
        return Volume{float(v[0]), float(v[1]), float(v[2])};
    };
    if (name == "mask") return Volume(scan.mask.begin(), scan.mask.end());
    if (name == "voxel_size_mm") return three(scan.geometry.voxel_size_mm);
    if (name == "b0_direction") return three(scan.geometry.b0_direction);
    const auto sign = static_cast<float>(field_sign(card));
    if (sign == 1) return {};  // the field
    Volume field = scan.local_field_ppm;
    for (float &value : field) value *= sign;
    return field;
}

}  // namespace

double field_sign(const Card &card) {
    const auto sign = card.constants.find("field_sign");
    return sign == card.constants.end() ? 1 : sign->second;
}

std::vector<Volume> network_inputs(const Card &card, const Scan &scan, int threads,
                                   Caller &caller) {
    Made made = prior_maps(card, scan, threads, caller);
    std::vector<Volume> inputs;
    for (const TensorInfo &tensor : card.inputs) {
        const auto found = made.find(tensor.name);
        inputs.push_back(found == made.end() ? known(card, tensor.name, scan) : std::move(found->second));
    }
    return inputs;
}

size_t input_index(const Card &card, const std::string &name) {
    size_t n = 0;
    while (card.inputs.at(n).name != name) ++n;
    return n;
}

std::vector<size_t> input_shape(const std::string &name, const Shape &patch) {
    if (name == "voxel_size_mm") return {3};
    if (name == "b0_direction") return {1, 3};
    if (name == "field_noise_ppm") return {1};
    return {1, 1, size_t(patch[0]), size_t(patch[1]), size_t(patch[2])};
}

}  // namespace qsm::host
