// The model card, as runtime/card.py reads it: strictly. docs/model-card.md says what fields mean.
#ifndef QSM_RUNTIME_CARD_H
#define QSM_RUNTIME_CARD_H

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace qsm::host {

// A size of a tensor: a number, or the letter of a free axis.
struct Size {
    int64_t number;      // 0 where free
    std::string letter;  // "" where not
};

struct TensorInfo {
    std::string name, unit;
    std::vector<Size> shape;

    // Whether it has a value for every voxel, as (n, c, x, y, z).
    bool is_volume() const { return shape.size() == 5; }
};

struct ReceptiveField {
    std::optional<int64_t> theoretical, halo;  // [voxels] to each side
    double energy_kept;
};

struct GeometryLimits {
    std::optional<std::vector<double>> voxel_size_mm, b0_direction;  // 3 each
    std::optional<double> voxel_tolerance, b0_tolerance_deg;
};

// A map that the runtime makes of the whole volume, for the input of that name.
struct PriorMap {
    std::string name, method, of;
    int64_t steps;
    std::optional<double> threshold;

    bool is_tkd() const { return method == "tkd"; }  // else it is of total variation
};

// What a map keeps of a prior map: what lies next to the magic cone.
struct Anchor {
    std::string prior;
    double threshold;
};

// Blocks of one size at fixed places, for a network that its authors run so.
struct Tiles {
    std::vector<int64_t> size, kept, stride;  // 3 each [voxels]
    std::string beyond, blend;
};

struct MemoryUse {
    int64_t fixed_bytes, bytes_per_voxel;
};

struct Card {
    std::string network, task, pipeline, patchable, precision, axes = "RAS";
    std::vector<TensorInfo> inputs;
    TensorInfo output;
    std::vector<TensorInfo> further_outputs;
    int64_t divisor;
    std::string pad_front = "ceil";  // how much of the padding to the divisor lies in front
    std::optional<std::string> why_whole;
    ReceptiveField receptive_field;
    GeometryLimits geometry;
    std::vector<PriorMap> priors;  // in the order in which they are made
    std::optional<Anchor> anchor;
    std::optional<Tiles> tiles;
    std::map<std::string, double> normalisation, constants;
    std::map<std::string, std::string> options;
    std::map<std::string, MemoryUse> memory;
    std::string json;  // as it was read

    std::vector<TensorInfo> outputs() const;  // all that the graph gives, in order
};

// Throws an Error with QSM_ENGINE_ERROR if it is no card of this schema, or contradicts itself.
Card parse_card(const std::string &json);

// What a network may be for.
std::vector<std::string> task_names();

// What makes a card contradict itself, one line, "" for nothing.
std::string contradictions(const Card &card);

// Refuses networks that this library does not run, naming what does.
void require_supported(const Card &card);

// Refuses a card that names other inputs or outputs than the graph of a model has.
void require_names(const std::string &path, const Card &card, std::vector<std::string> inputs,
                   const std::vector<std::string> &outputs);

}  // namespace qsm::host

#endif
