// One element's AdamW step, for the CPU walker and the CUDA walker. F is float or double.
#pragma once

#ifdef __CUDACC__
#include <math.h>
#else
#include <cmath>
#endif

#include "number.h"

namespace safeopt {

// The numbers of a step that are the same for every element of a tensor.
template <class F>
struct Step {
  F decay;           // 1 - lr * weight_decay
  F weight1, beta1;  // 1 - beta1
  F weight2, beta2;  // 1 - beta2
  F size;            // lr / (1 - beta1^t)
  F correction2;     // 1 / sqrt(1 - beta2^t)
  F eps;
  F unscale;  // of the gradients: 1 / the scaler's factor, negative to maximize
  F pull;     // anchor_strength if coupled, lr * anchor_strength if decoupled
};

// How an element is drawn to its anchor: not at all, through the gradient, or beside the decay.
enum class Pull : int32_t { none, coupled, decoupled };

namespace {

SAFEOPT_HD float root(float x) { return sqrtf(x); }
SAFEOPT_HD double root(double x) { return sqrt(x); }
template <class F>
SAFEOPT_HD F at_most_one(F x) {
  return x < F(1) ? x : F(1);
}
template <class F>
SAFEOPT_HD F larger(F x, F y) {  // NaN if x is, as torch.maximum
  return x > y || x != x ? x : y;
}

// All in one place, so that host and device derive them alike, in double.
template <class F>
SAFEOPT_HD Step<F> step_of(double t, double lr, double beta1, double beta2, double weight_decay,
                           double eps, bool maximize, double scale, double strength, Pull pull) {
  return {F(1 - lr * weight_decay),
          F(1 - beta1),
          F(beta1),
          F(1 - beta2),
          F(beta2),
          F(lr / (1 - pow(beta1, t))),
          F(1 / sqrt(1 - pow(beta2, t))),
          F(eps),
          F((maximize ? -1 : 1) / scale),
          F(pull == Pull::decoupled ? lr * strength : strength)};
}

template <class F>
SAFEOPT_HD Step<F> narrowed(const Step<double>& s) {
  return {F(s.decay), F(s.weight1),     F(s.beta1), F(s.weight2), F(s.beta2),
          F(s.size),  F(s.correction2), F(s.eps),   F(s.unscale), F(s.pull)};
}

// Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2; with AMSGRAD, Reddi et al. 2018
// (arXiv 1904.09237). With PULL each element is drawn to `anchor` with strength pull * share; where
// that is decoupled, no step goes past the anchor.
template <bool AMSGRAD, Pull PULL, class F>
SAFEOPT_HD void adamw(F& p, F g, F& m, F& v, F& v_max, F anchor, F share, const Step<F>& s) {
  g *= s.unscale;
  F moved = p * s.decay;
  if (PULL != Pull::none) {
    F pull = s.pull * share;
    if (PULL == Pull::decoupled) {
      moved -= at_most_one(pull) * (moved - anchor);
    } else {
      g += pull * (p - anchor);
    }
  }
  m += s.weight1 * (g - m);
  v = s.beta2 * v + s.weight2 * g * g;
  F second = v;
  if (AMSGRAD) {
    v_max = larger(v, v_max);
    second = v_max;
  }
  p = moved - s.size * m / (root(second) * s.correction2 + s.eps);
}

}  // namespace
}  // namespace safeopt
