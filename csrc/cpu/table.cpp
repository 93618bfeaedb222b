#include "cpu/kernels.h"

namespace genfast::cpu::GENFAST_ISA {

extern const Kernels table = {
    random,         reparameterize,          reparameterize_backward,
    gumbel_softmax, gumbel_softmax_backward, relaxed_bernoulli,
    categorical,
};

}  // namespace genfast::cpu::GENFAST_ISA
