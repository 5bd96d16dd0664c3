"""The objective as the paper writes it, slowly: what the package's own must equal.

Every edge is a call of the network, every window a depthwise convolution, every warp a call of
`grid_sample`, every Jacobian four evaluations of the composed map. Nothing is shared with the
package but the records that hold images and maps.

GradICON's network is the ICON project's. TransMorph and CorrMLP are as their papers draw them,
around the parameters of the package's: features that meet are concatenated and convolved once,
attention and correlation are written out, images keep PyTorch's default order in memory, and
nothing is recomputed, shared or fused.
"""

import itertools

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


def plain_network(network):
    """
    Build the plain counterpart of a `TransMorph` or a `CorrMLP`, around the same parameters.

    Returns
    -------
    callable
        Takes moving and fixed images to displacements, as the network does.
    """
    return {"TransMorph": plain_transmorph, "CorrMLP": plain_corrmlp}[type(network).__name__](
        network
    )


def join(*convs):
    """Weights of one convolution of concatenated channels, from one for each part."""
    return torch.cat([conv.weight for conv in convs], 1)


def convolve(conv, x):
    return functional.conv3d(x, conv.weight, conv.bias, padding=1)


def layer_norm(norm, x):
    return functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias)


def to_channels_first(x):
    return x.permute(0, 4, 1, 2, 3).contiguous()


def to_channels_last(x):
    return x.permute(0, 2, 3, 4, 1).contiguous()


def pad_end(x, steps):
    """Append zeros to the spatial axes of (N, I, J, K, C) up to multiples of the steps."""
    i, j, k = (-size % step for size, step in zip(x.shape[1:4], steps, strict=True))
    return functional.pad(x, (0, 0, 0, k, 0, j, 0, i))


def windows_of(x, window):
    """Cut (N, I, J, K, C) into windows (N * n_windows, L, C)."""
    n, i, j, k, c = x.shape
    a, b, d = window
    x = x.view(n, i // a, a, j // b, b, k // d, d, c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).contiguous().view(-1, a * b * d, c)


def from_windows(windows, window, shape):
    """Undo `windows_of`."""
    n, i, j, k, c = shape
    a, b, d = window
    x = windows.view(n, i // a, j // b, k // d, a, b, d, c)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).contiguous().view(n, i, j, k, c)


def plain_transmorph(network):
    def conv_norm(conv, x):
        return functional.leaky_relu(functional.instance_norm(convolve(conv, x)))

    def attend(layer, x):
        grid = x.shape[1:4]
        window = [min(sizes) for sizes in zip(layer.window_size, grid, strict=True)]
        shift = [s if w < g else 0 for s, w, g in zip(layer.shift, window, grid, strict=True)]
        # What a token must not see: padding, and what the cyclic shift brings beside it.
        region = torch.zeros(1, *grid, 1)
        region = pad_end(region + 1, window)
        for axis in range(3):
            wrapped = torch.arange(region.shape[axis + 1]) < shift[axis]
            shape = [1] * 5
            shape[axis + 1] = -1
            region = 2 * region + wrapped.view(shape)
        x = pad_end(x, window)
        rolled = torch.roll(x, [-s for s in shift], (1, 2, 3))
        region = windows_of(torch.roll(region, [-s for s in shift], (1, 2, 3)), window)
        tokens = windows_of(rolled, window)
        n, length, width = tokens.shape
        qkv = layer.qkv(tokens).view(n, length, 3, layer.n_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        logits = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        positions = torch.tensor(list(itertools.product(*map(range, window))))
        offsets = positions[:, None] - positions[None]
        sizes = torch.tensor([2 * w - 1 for w in layer.window_size])
        offsets = offsets + torch.tensor(layer.window_size) - 1
        index = (offsets[..., 0] * sizes[1] + offsets[..., 1]) * sizes[2] + offsets[..., 2]
        logits = logits + layer.bias_table[index].permute(2, 0, 1)
        region = region.to(x.device)
        hidden = (region != region.transpose(1, 2)).repeat(n // len(region), 1, 1)
        logits = logits.masked_fill(hidden[:, None], -torch.inf)
        attended = (logits.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width)
        y = from_windows(layer.project(attended), window, x.shape)
        y = torch.roll(y, shift, (1, 2, 3))
        return y[:, : grid[0], : grid[1], : grid[2]].contiguous()

    def drop(block, branch):
        if not network.training or block.drop_path == 0:
            return branch
        keep = 1 - block.drop_path
        return branch * (torch.rand(len(branch), 1, 1, 1, 1).to(branch) < keep) / keep

    def encode(encoder, images):
        padding = -images.shape[-1] % 4
        x = encoder.embed(functional.pad(images, (0, padding) * 3))
        x = encoder.embed_norm(to_channels_last(x))
        features = []
        for i, (stage, norm) in enumerate(zip(encoder.stages, encoder.norms, strict=True)):
            if i:
                merge = encoder.merges[i - 1]
                x = pad_end(x, (2, 2, 2))
                corners = itertools.product((0, 1), repeat=3)
                x = torch.cat([x[:, a::2, b::2, c::2] for a, b, c in corners], -1)
                x = merge.reduce(merge.norm(x))
            for block in stage:
                x = x + drop(block, attend(block.attention, block.attention_norm(x)))
                x = x + drop(block, block.mlp(block.mlp_norm(x)))
            features.append(to_channels_first(norm(x)))
        return features

    def predict(moving, fixed):
        images = torch.cat((moving, fixed), 1)
        half = functional.avg_pool3d(images, 3, stride=2, padding=1)
        skips = [conv_norm(network.full_conv, images), conv_norm(network.half_conv, half)]
        skips += encode(network.encoder, images)
        x = skips.pop()
        for block, skip in zip(reversed(network.decoder), reversed(skips), strict=True):
            x = functional.interpolate(x, scale_factor=2, mode="trilinear")
            i, j, k = skip.shape[2:]
            x = torch.cat((x[:, :, :i, :j, :k], skip), 1)
            x = functional.conv3d(x, join(block.coarse_conv, block.skip_conv), padding=1)
            x = functional.leaky_relu(functional.instance_norm(x))
            x = conv_norm(block.refine_conv, x)
        return convolve(network.head, x) / (moving.shape[-1] - 1)

    return predict


def plain_corrmlp(network):
    def correlate(a, b):
        i, j, k = a.shape[2:]
        padded = functional.pad(b, (1,) * 6)
        offsets = itertools.product(range(3), repeat=3)
        return torch.stack(
            [(a * padded[:, :, u : u + i, v : v + j, w : w + k]).mean(1) for u, v, w in offsets],
            1,
        )

    def gate(mixer, x):
        wide = functional.gelu(mixer.widen(layer_norm(mixer.norm, x)))
        values, gates = wide.chunk(2, -1)
        gates = layer_norm(mixer.gate_norm, gates)
        window = (mixer.window,) * 3
        padded = pad_end(gates, window)
        cubes = windows_of(padded, window).transpose(1, 2)
        mixed = from_windows(mixer.gate(cubes).transpose(1, 2), window, padded.shape)
        i, j, k = x.shape[1:4]
        return x + mixer.project(values * (1 + mixed[:, :i, :j, :k]))

    def mix(layer, x):
        normed = layer_norm(layer.norm, x)
        outputs = torch.stack([gate(mixer, normed) for mixer in layer.mixers])
        weights = layer.weigh(outputs.sum(0).mean((1, 2, 3)))
        weights = weights.view(len(x), -1, len(outputs)).softmax(-1).permute(2, 0, 1)
        return x + layer.project((outputs * weights[:, :, None, None, None]).sum(0))

    def attend(layer, x):
        first, _, second = layer.convs
        y = functional.leaky_relu(
            convolve(first, to_channels_first(layer_norm(layer.norm, x))), 0.2
        )
        y = to_channels_last(convolve(second, y))
        return x + y * layer.scale(y.mean((1, 2, 3), keepdim=True))

    def match(layer, a, b):
        x = torch.cat((a, correlate(a, b), b), 1)
        n = a.shape[1]
        weight = layer.features_conv.weight
        weight = torch.cat((weight[:, :n], layer.correlation_conv.weight, weight[:, n:]), 1)
        x = functional.conv3d(x, weight, layer.features_conv.bias, padding=1)
        y = attend(layer.attend, mix(layer.mix, to_channels_last(x)))
        return x + to_channels_first(y)

    def encode(image):
        levels = []
        for i, block in enumerate(network.encoder):
            image = functional.avg_pool3d(image, 2, ceil_mode=True) if i else image
            for conv in (block[0], block[3]):
                image = functional.leaky_relu(convolve(conv, image), 0.2)
                image = functional.instance_norm(image)
            levels.append(image)
        return levels

    def predict(moving, fixed):
        moving_levels, fixed_levels = encode(moving), encode(fixed)
        x = match(network.match[-1], fixed_levels[-1], moving_levels[-1])
        disp = convolve(network.heads[-1], x)
        for level in reversed(range(len(moving_levels) - 1)):
            size = moving_levels[level].shape[-1]
            disp = 2 * functional.interpolate(
                disp, (size,) * 3, mode="trilinear", align_corners=True
            )
            points = identity(size, disp) + disp / (size - 1)
            warped = pull(moving_levels[level], points, "zeros")
            matched = match(network.match[level], fixed_levels[level], warped)
            expand = network.expand[level]
            expanded = to_channels_first(layer_norm(expand.norm, to_channels_last(expand.up(x))))
            x = match(network.fuse[level], matched, expanded[:, :, :size, :size, :size])
            disp = disp + convolve(network.heads[level], x)
        return disp / (moving.shape[-1] - 1)

    return predict
