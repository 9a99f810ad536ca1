# SPDX-License-Identifier: Apache-2.0
"""Samplers that normalise top-k, nucleus and temperature once over whole texts, and what the usual ones distort.

Plain sampling divides by the mass Z of what it kept at every token, so that a text w has the probability
``prod_t w_t / Z_t``. A text whose contexts keep little mass is thereby favoured: by ``eps(w) = prod_t 1 / Z_t``, the
distortion of local normalisation. As an equilibrium state plain sampling maximises entropy plus mean log-likelihood
plus mean ``log eps``; without that last reward one gets the text's weight over the sum A of all texts' weights, and
``log A``, per token the pressure, is what is gained. A is not known for a language model, but it can be drawn from:

- ``lnd.rejection`` draws from the model itself and rejects what leaves the cut, exactly, in ``1 / A`` tries;
- ``lnd`` lets particles of plain sampling multiply by their masses Z, a sequential Monte Carlo.

Local Normalization Distortion and the Thermodynamic Formalism of Decoding Strategies for Large Language Models (arXiv
2503.21929).

Shapes: ``logits [R, V]`` in float32, texts of P prompts and C copies of N particles, tokens int64.

Differences. The paper's only sampler is rejection; particles are ours, and so is the exact law where A can be summed,
in a chain of finitely many states (``formalism``). Its corollary for temperature is printed with the distortion of the
untempered model; what holds, and stands here, is that with ``Z = sum p^(1/temperature)``. A token that ends the text
is one of its tokens, and a text that has ended keeps its weight.
"""

from .formalism import Chain, Law
from .lnd import GlobalSampling
from .rejection import GlobalRejection

__all__ = ["Chain", "GlobalRejection", "GlobalSampling", "Law"]
