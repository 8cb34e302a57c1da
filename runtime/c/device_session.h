// A loaded network on a GPU: inference on device pointers, nothing more.
#ifndef QSM_RUNTIME_DEVICE_SESSION_H
#define QSM_RUNTIME_DEVICE_SESSION_H

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "session.h"

namespace qsm::host {

class DeviceSession {
  public:
    virtual ~DeviceSession() = default;

    const Card &card() const { return card_; }

    // The engine's name, for people.
    virtual const char *backend() const = 0;

    // Returns the device memory that one inference needs besides inputs and output; nothing if the
    // engine does not serve these shapes. Of the tensors no data is read.
    virtual std::optional<size_t> scratch_bytes(const std::vector<Tensor> &inputs) = 0;

    // Enqueues one run on a stream. `output` takes a volume of the shape of the first input;
    // `scratch` is what scratch_bytes() said, aligned to 256 bytes.
    virtual void enqueue(const std::vector<Tensor> &inputs, float *output, void *scratch,
                         void *stream) = 0;

  protected:
    Card card_;
};

// Opens the engine in a plan on the current GPU; `path` is for messages. Throws NoGpu where there
// is none, Unfit if the engine is for another. Defined in session_tensorrt.cpp, in
// session_no_tensorrt.cpp, or by the tests.
std::unique_ptr<DeviceSession> open_engine_session(const std::string &path,
                                                   const std::string &engine);

}  // namespace qsm::host

#endif
