"""Checks of the weights and of the objective: each from evidence to what it found, in words."""

import math

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from varify.analysis.checks import Found, check
from varify.analysis.evidence import Evidence, doubled, floating, share
from varify.errors import listed
from varify.network.arguments import has_length
from varify.objective.elbo import scalar
from varify.priors.gaussian import AT_PRIOR, is_gaussian, kl_of_each_weight
from varify.weights.posterior import GaussianPosterior
from varify.within import learns_undrawn

MOSTLY = 0.5  # a share from which on the prior has the loss, or the weights
# Of the nll, what having the data's own targets, and not others', makes it less: below the one nothing was learned,
# above the other it was.
LEAST_LEARNED, LEARNED = 0.01, 0.5
COLLAPSED = 1e-3  # sigma relative to what a weight could be
MANY_COLLAPSED = 0.1
ROUNDING = 1e-3  # relative: losses may be in half precision


# --- the weights alone


@check("not-finite", change="go back to a checkpoint; lower the learning rate, or clip gradients (clip_grad_norm_)")
def _not_finite(e: Evidence) -> Found | str:
    bad = [name for name, q in e.posteriors.items() if not (q.mean.isfinite().all() and q.rho.isfinite().all())]
    if bad:
        return Found("error", f"{listed(bad)} have a mu or rho that is no finite number", {"tensors": len(bad)})
    return Found("fine", "every mu and rho is a finite number")


@check(
    "eval-mode",
    change="call vnet.train() before the training loop; networks from checkpoints often arrive in eval mode. One that "
    "was trained so has sigmas that nothing but the prior held: varify.variationalize(vnet.mean_model()).train() is a "
    "new start from its means",
)
def _eval_mode(e: Evidence) -> Found | str:
    if not learns_undrawn(e.network):
        return Found("fine", "weights are drawn wherever gradients are on")
    return Found("warning", "in eval mode with gradients on: trained so, weights are never drawn, and elbo.step stays")


@check(
    "at-prior",
    change="such weights say nothing of the data, and only add noise (unless training starts there). Lower beta, start "
    "from small sigmas (init='of_weights') or a pretrained network, choose another prior, or varify.prune them",
)
def _at_prior(e: Evidence) -> Found | str:
    known = {name: q for name, q in e.posteriors.items() if is_gaussian(q.prior) and q.unmasked().rho.numel()}
    others = [name for name, q in e.posteriors.items() if not is_gaussian(q.prior)]
    if not known:
        return f"the KL of a single weight is known for Gaussian priors, which none of {listed(e.posteriors)} has"
    with torch.no_grad():
        kls = [kl_of_each_weight(q) for q in known.values()]
    part = share([(int((kl < AT_PRIOR).sum()), kl.numel()) for kl in kls])
    left = f"; not covered, for want of a Gaussian prior: {listed(others)}" if others else ""
    message = f"{part:.1%} of the weights are at the prior, with less than {AT_PRIOR} nats each{left}"
    return Found("warning" if part >= MOSTLY else "fine", message, {"share": part})


@check(
    "collapsed",
    change="they are as good as deterministic. See that the criterion is a mean over the batch and num_data the number "
    "of training data, lower rho's learning rate (varify.parameter_groups), and start again with init='of_weights'",
)
def _collapsed(e: Evidence) -> Found | str:
    with torch.no_grad():
        counts = [_count_collapsed(q.unmasked()) for q in e.posteriors.values()]
    if not sum(n for _, n in counts):
        return "no weight is random"
    part = share(counts)
    message = (
        f"{part:.1%} of the weights have collapsed: sigma is below {COLLAPSED:g} of the prior's std and of the root "
        "mean square of their tensor's means"
    )
    return Found(
        "error" if part >= MOSTLY else "warning" if part >= MANY_COLLAPSED else "fine", message, {"share": part}
    )


def _count_collapsed(q: GaussianPosterior) -> tuple[int, int]:
    """How many weights have a sigma that is nothing beside both the prior's and the size of the means; of how many.

    Where sigma started is not kept. Against one of the two alone, a wide prior or a tensor of large weights would have
    sigmas collapsed that matter. A tensor of zeros has no size; a prior may have no std.
    """
    if not q.rho.numel():
        return 0, 0
    std, size = q.prior.stddev(), q.mean.square().mean().sqrt()
    scale = torch.as_tensor(math.inf if std is None else std).to(size)
    scale = torch.where(size > 0, torch.minimum(scale, size), scale)
    return int((q.sigma < COLLAPSED * scale).logical_and(scale.isfinite()).sum()), q.rho.numel()


# --- the objective


@check(
    "not-finite-loss",
    *("batch", "criterion"),
    change="where inputs or targets are at fault, clean the data; else lower the learning rate, clip gradients, or "
    "look for a logarithm or a quotient in the network and the criterion",
)
def _not_finite_loss(e: Evidence) -> Found | str:
    parts = {
        "inputs": floating((e.batch.args, dict(e.batch.kwargs))),
        "targets": floating(e.batch.targets),
        "outputs": floating(e.trained.output),
    }
    bad = [part for part, tensors in parts.items() if not all(x.isfinite().all() for x in tensors)]
    if math.isfinite(e.trained.nll):
        return Found("fine", "the loss is a finite number")
    if not all(q.mean.isfinite().all() and q.rho.isfinite().all() for q in e.posteriors.values()):
        return "the weights are not finite themselves"
    return Found("error", f"the loss is {e.trained.nll}" + (f", and so are some of the {listed(bad)}" if bad else ""))


@check(
    "kl-dominates",
    *("batch", "criterion", "num_data"),
    change="where the nll does not fall, lower beta or warm it up (varify.schedules.warm_up) and start anew, since a "
    "network at its prior hardly leaves it; fit the prior (varify.fit_prior), or center it on a pretrained network "
    "(varify.priors.Gaussian(centered=True))",
)
def _kl_dominates(e: Evidence) -> Found | str:
    nll = e.trained.nll
    with torch.no_grad():
        kl = e.beta * sum(float(q.kl_divergence()) for q in e.posteriors.values()) / e.num_data
    if not math.isfinite(kl + nll):
        return f"the loss is not finite: beta·KL/num_data is {kl:.4g} nats, the nll {nll:.4g}"
    if nll <= 0:
        return f"the nll of {nll:.4g} is not positive, as that of a density may be, so the KL is no share of the loss"
    if _is_sum(_once_and_twice(e)):
        return "the criterion is no mean over the batch, so the nll per datum is unknown"
    part = kl / (kl + nll)
    message = f"of the loss per datum, {part:.1%} is the prior's: beta·KL/num_data is {kl:.4g} nats, the nll {nll:.4g}"
    figures, learned = {"share": part, "kl": kl, "nll": nll}, e.trained.learned
    if part >= MOSTLY and learned is not None:
        message += f", {abs(learned):.0%} {'less' if learned >= 0 else 'more'} than with the targets of other data"
        figures["learned"] = learned
    if part < MOSTLY or (learned is not None and learned > LEARNED):
        # Even tempered, the KL of many weights is most of the loss once the nll is small: most of it is the same for
        # all means, and weighs nothing against learning.
        return Found("fine", message, figures)
    return Found("warning" if learned is None or learned > LEAST_LEARNED else "error", message, figures)


@check(
    "num-data",
    *("batch", "num_data"),
    change="divide the KL by the size of the training set, not of the batch: num_data=len(train_set)",
)
def _num_data(e: Evidence) -> Found | str:
    size, total, n = e.batch.size, e.batch.total, e.num_data
    figures = {"num_data": n, "batch": size} | ({} if total is None else {"data": total})
    if n < (total or size):
        why = ", the size of the batch" if n == size else ""
        return Found("error", f"num_data={n}{why}, but there are {total or size} data: the KL weighs too much", figures)
    if total is None and n == size:
        return Found("warning", f"num_data={n} is the size of the batch: right only if that is all the data", figures)
    return Found("fine", f"num_data={n}, in batches of {size}", figures)


@check(
    "summed-criterion",
    *("batch", "criterion"),
    change="use a criterion that is a mean over the batch (reduction='mean'): elbo adds KL/num_data to it",
)
def _summed_criterion(e: Evidence) -> Found | str:
    found = _once_and_twice(e)
    if isinstance(found, str):
        return found
    once, twice = found
    ratio = twice / once if once else math.nan
    if _is_sum(found):
        message = (
            f"the criterion goes from {once:.4g} to {twice:.4g} for a batch and its copy: it is a sum, or divided by a "
            f"fixed number. A sum makes the KL count {e.batch.size} times too little"
        )
        return Found("error", message, {"ratio": ratio})
    if abs(ratio - 1) < 0.02:
        return Found("fine", "the criterion is a mean over the batch", {"ratio": ratio})
    return f"the criterion is neither mean nor sum: {once:.4g} for the batch, {twice:.4g} for it and its copy"


def _is_sum(found: tuple[float, float] | str) -> bool:
    return not isinstance(found, str) and bool(found[0]) and abs(found[1] / found[0] - 2) < 0.02


def _once_and_twice(e: Evidence) -> tuple[float, float] | str:
    """The criterion of the batch, and of the batch and its copy; why it can't be told."""
    leaves = pytree.tree_leaves(e.trained.output)
    if not any(has_length(x) for x in leaves):
        return f"the network returns a {type(e.trained.output).__name__} without a tensor that can be doubled"
    with torch.no_grad():
        value = e.criterion(e.trained.output, e.batch.targets)
        if any(value is x for x in leaves):
            return "the network computes the loss itself"
        try:
            return float(value), float(scalar(e.criterion(doubled(e.trained.output), doubled(e.batch.targets))))
        except Exception as error:
            return f"the criterion takes no batch of twice the size ({type(error).__name__}: {error})"


@check(
    "squared-error",
    *("batch", "criterion"),
    change="criterion = varify.GaussianLikelihood(), which learns the noise: give its parameters to the optimizer too",
)
def _squared_error(e: Evidence) -> Found | str:
    with torch.no_grad():
        value = float(scalar(e.criterion(e.trained.output, e.batch.targets)))
    outputs, labels = floating(e.trained.output), floating(e.batch.targets)
    if not outputs:
        return f"the network returns a {type(e.trained.output).__name__} without a tensor to compare with the targets"
    for found, target in ((x, y) for x in outputs for y in labels if x.shape == y.shape):
        mse = float(F.mse_loss(found.double(), target.double()))
        # the mean over a datum's targets too divides all of them
        for loss, var in ((mse, 0.5 * target[0].numel()), (mse * target.numel(), 0.5)):
            if loss > 0 and math.isclose(value, loss, rel_tol=ROUNDING):
                message = (
                    f"the criterion is the squared error, as of a Gaussian likelihood with a variance of {var:g} (std "
                    f"{math.sqrt(var):.3g}) whatever the targets' noise and unit; the squared error is {mse:.4g}"
                )
                return Found("error", message, {"var": var, "mse": mse})
    return Found("fine", "the criterion is no bare squared error")
