"""The objective as the paper writes it, slowly: what the package's own must equal.

Every edge is a call of the network, every window a depthwise convolution, every warp a call of
`grid_sample`, every Jacobian four evaluations of the composed map. Nothing is shared with the
package but the records that hold images and maps.
"""

import torch
from torch.nn import functional

STEP = 1e-3  # of the finite differences, unit coordinates


def identity(size, like):
    axis = torch.linspace(0, 1, size, dtype=like.dtype, device=like.device)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))[None]


def pull(image, points, padding):
    """Sample an image at unit coordinates."""
    grid = points.permute(0, 2, 3, 4, 1).flip(-1) * 2 - 1
    return functional.grid_sample(
        image, grid, mode="bilinear", padding_mode=padding, align_corners=True
    )


def as_function(disp):
    """Turn a displacement into the map that it stands for, a function of points."""
    return lambda points: points + pull(disp, points, "border")


def lncc(a, b, sigma=5):
    """1 - LNCC: a Gaussian window of ``4 sigma + 1`` taps as three depthwise convolutions."""
    taps = torch.arange(-2 * sigma, 2 * sigma + 1, dtype=a.dtype, device=a.device)
    taps = torch.exp(-0.5 * (taps / sigma) ** 2)
    taps = taps / taps.sum()

    def window(x):
        for axis in range(3):
            shape = [1, 1, 1, 1, 1]
            shape[2 + axis] = len(taps)
            padding = [0, 0, 0]
            padding[axis] = 2 * sigma
            kernel = taps.view(shape).expand(x.shape[1], 1, -1, -1, -1)
            x = functional.conv3d(x, kernel, padding=tuple(padding), groups=x.shape[1])
        return x

    mean_a, mean_b = window(a), window(b)
    var_a = window(a * a) - mean_a * mean_a
    var_b = window(b * b) - mean_b * mean_b
    covariance = window(a * b) - mean_a * mean_b
    # Rounding can leave a flat window a negative variance.
    scale = torch.sqrt((var_a.clamp_min(0) + 1e-5) * (var_b.clamp_min(0) + 1e-5))
    return (1 - covariance / scale).mean()


def jacobian_loss(cycle, size, like, generator=None):
    """Mean of ||grad(cycle) - I||^2 at points of every second voxel, moved by noise of a voxel."""
    points = identity(size, like).expand(len(like), -1, -1, -1, -1)
    noise = torch.randn(points.shape, generator=generator).to(points)
    points = (points + noise / size)[..., ::2, ::2, ::2]
    base = cycle(points)
    total = 0
    for axis in range(3):
        offset = torch.zeros(1, 3, 1, 1, 1, dtype=points.dtype, device=points.device)
        offset[0, axis] = STEP
        difference = (cycle(points + offset) - base - offset) / STEP
        total = total + difference.square().sum(1).mean()
    return total


def diffusion(disp):
    """Mean of ||grad u||^2 by forward differences."""
    size = disp.shape[-1]
    base = disp[:, :, :-1, :-1, :-1]
    total = 0
    for shifted in (
        disp[:, :, 1:, :-1, :-1],
        disp[:, :, :-1, 1:, :-1],
        disp[:, :, :-1, :-1, 1:],
    ):
        total = total + ((shifted - base) * (size - 1)).square().sum(1).mean()
    return total


def compose(outer, inner):
    return lambda points: outer(inner(points))


def m2m_losses(
    predict,
    pairs,
    *,
    regularizer="gradicon",
    regularity_weight=0.5,
    gradcycon_weight=0.1,
    generator=None,
):
    """
    Evaluate Eqs. 2, 3 and 6.

    ``predict`` takes a moving and a fixed image to a displacement on the fixed grid, unit
    coordinates. Returns the weighted terms by the names of the package.
    """
    s, t, s2, t2 = pairs.s, pairs.t, pairs.bridge_s, pairs.bridge_t
    size = s.shape[-1]
    disp = predict(s, t)
    st = as_function(disp)
    ts2 = as_function(predict(t, s2))
    t2s = as_function(predict(t2, s))
    s2t2 = (lambda points: points) if pairs.is_aligned else as_function(predict(s2, t2))
    grid = identity(size, s).expand(len(s), -1, -1, -1, -1)

    def similarity(image, phi, fixed):
        return lncc(pull(image, phi(grid), "zeros"), fixed)

    losses = {
        "similarity": similarity(s, compose(st, ts2), s2)
        + similarity(s2, compose(s2t2, t2s), s)
        + similarity(t, compose(ts2, s2t2), t2)
        + similarity(t2, compose(t2s, st), t)
    }
    if gradcycon_weight:
        cycle = compose(st, compose(ts2, compose(s2t2, t2s)))
        losses["gradcycon"] = gradcycon_weight * jacobian_loss(cycle, size, s, generator)
    if regularizer == "gradicon":
        ts = as_function(predict(t, s))
        value = jacobian_loss(compose(st, ts), size, s, generator)
    else:
        value = diffusion(disp)
    losses["regularity"] = regularity_weight * value
    return losses


def icon_gradicon(network, size):
    """
    Build the ICON project's network with the weights of a `GradICON`, its batch statistics too.

    Parameters
    ----------
    network : GradICON
        Of three scales and batch normalisation.
    size : int
        Of the images.

    Returns
    -------
    predict : callable
        Takes a moving and a fixed image to a displacement.
    module : Module
    names : dict
        Their parameters' names by ours.
    """
    import icon_registration
    from icon_registration import networks

    from m2m_bids.registration.networks.gradicon import from_icon

    config = network.config
    widths = [[2, *config.down_widths], list(config.up_widths)]

    def unet():
        return icon_registration.FunctionFromVectorField(
            networks.UNet2(len(config.down_widths), widths, dimension=3)
        )

    module = unet()
    for _ in range(config.n_scales - 1):
        module = icon_registration.TwoStepRegistration(
            icon_registration.DownsampleRegistration(module, dimension=3), unet()
        )
    module.assign_identity_map((1, 1, size, size, size))
    names = from_icon({name: name for name in module.state_dict()}, n_scales=config.n_scales)
    like = next(network.parameters())
    module.to(like)
    for part in module.modules():
        if hasattr(part, "identity_map"):
            # Made in float32.
            part.identity_map.copy_(identity(part.identity_map.shape[-1], like))
    state = network.state_dict()
    module.load_state_dict({theirs: state[ours] for ours, theirs in names.items()})
    module.train(network.training)

    def predict(moving, fixed):
        # The functions of maps that the project works with recognise its identity map by a tag.
        module.identity_map.isIdentity = True
        return module(moving, fixed)(module.identity_map) - module.identity_map

    return predict, module, names
