"""optimizer.py: AdamW (Loshchilov and Hutter 2019), with the update of UNITER's official code."""

import math

import torch
from torch.optim.adamw import adamw

BETAS = (0.9, 0.98)
EPS = 1e-6


class AdamW:
    """For a parameter p with gradient g in its step t = 1, 2, ..., at learning rate r and weight decay d:

        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g^2
        u  = sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)
        p <- (p - r u) (1 - r d)

    A parameter without a gradient takes no step: neither its t nor its moments change. Matrices decay; vectors and numbers
    (biases, norms, UNITER's mask vector) do not. Parameters named in `at_random` have `lr_new` times the learning rate of
    the others.

    torch.optim.AdamW cannot do this: it has one eps for all, but here it depends on t, and UNITER's heads differ in t. It
    also loads torch's compiler: 1.2 s and 68 MB in each process.
    """

    def __init__(self, model, weight_decay, at_random=(), lr_new=1.0):
        self.parameters = dict(model.named_parameters())
        self.weight_decay = weight_decay
        self.at_random = frozenset(at_random)
        self.lr_new = lr_new
        self.state = {}  # name of a parameter: {"step": t, "exp_avg": m, "exp_avg_sq": v}

    @torch.no_grad()
    def step(self, rate):
        """One step of every parameter that has a gradient. rate: the learning rate r."""
        alike = {}  # (r, d, t): names of parameters
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            if name not in self.state:
                zeros = torch.zeros_like(parameter)
                self.state[name] = {"step": 0, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            self.state[name]["step"] += 1
            rate_here = rate * self.lr_new if name in self.at_random else rate
            decay = self.weight_decay if parameter.ndim > 1 else 0.0
            alike.setdefault((rate_here, decay, self.state[name]["step"]), []).append(name)
        for (rate_here, decay, step), names in alike.items():
            self.fused_step(names, rate_here, decay, step)

    def fused_step(self, names, r, d, t):
        """Step t of these parameters, by torch's kernel, which reads and writes each number once.

        Torch's eps is added after the second moment's bias correction, so it gets eps / sqrt(1 - b2^t). Torch computes
        p (1 - r' d') - r' u, which equals (p - r u) (1 - r d) for r' = r (1 - r d) and d' = d / (1 - r d).
        """
        parameters = [self.parameters[name] for name in names]
        states = [self.state[name] for name in names]
        before = torch.full((len(names),), t - 1.0, device=parameters[0].device)  # torch counts the step itself
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[],
            state_steps=list(before.unbind()),
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=r * (1 - r * d),
            weight_decay=d / (1 - r * d),
            eps=EPS / math.sqrt(1 - BETAS[1] ** t),
        )

    def load_state(self, state):
        """Goes on from the `state` of another AdamW that has made steps. ValueError unless names and shapes fit."""
        if not state:
            raise ValueError("it has no state of the optimizer")
        loaded = {}
        for name, saved in state.items():
            if name not in self.parameters:
                raise ValueError(f"no parameter {name}")
            parameter = self.parameters[name].detach()
            loaded[name] = {"step": int(saved["step"])}
            for moment in ("exp_avg", "exp_avg_sq"):
                if saved[moment].shape != parameter.shape:
                    raise ValueError(f"{name} has another shape")
                loaded[name][moment] = torch.empty_like(parameter).copy_(saved[moment])
        self.state = loaded
