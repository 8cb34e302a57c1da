// A loaded network; one file per inference engine.
#ifndef QSM_RUNTIME_SESSION_H
#define QSM_RUNTIME_SESSION_H

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "card.h"
#include "scan.h"

namespace qsm::host {

struct Tensor {
    std::string name;
    std::vector<size_t> shape;  // (1, c, x, y, z) of volumes
    const float *data;

    bool is_volume() const { return shape.size() == 5; }
};

class Session {
  public:
    virtual ~Session() = default;

    const Card &card() const { return card_; }

    // The engine's name in the card's memory measurements.
    virtual const char *backend() const = 0;

    // What it computes in, whatever its weights are.
    virtual const char *precision() const { return "fp32"; }

    // Runs the network once. Returns its output, of the shape of the first input, which stays until
    // the next run. Calls `poll` again and again meanwhile, on this thread; ends where that throws.
    virtual const float *run(const std::vector<Tensor> &inputs,
                             const std::function<void()> &poll) = 0;

  protected:
    Card card_;
};

// Opens the bytes of an ONNX file on the CPU; `path` is for messages. Defined in
// session_openvino.cpp, or by the tests.
std::unique_ptr<Session> open_onnx_session(const std::string &path, const std::string &graph,
                                           int threads);

// Whether a name is that of a plan, by its ending.
bool is_plan(const std::string &path);

// Returns what is in a file. Throws a data error if there is none, or it cannot be read.
std::string read_file(const std::string &path);

// Checks that a graph begins as an ONNX model does.
void require_onnx(const std::string &path, const std::string &graph);

// Checks what a network gives: float32 ("f32") of the shape of its first input.
void require_output(const Card &card, const std::vector<size_t> &expected,
                    const std::vector<int64_t> &seen, const std::string &type);

// Reads the card in a model's metadata; errors begin with the path.
Card read_card(const std::string &path, const std::string &json);

}  // namespace qsm::host

#endif
