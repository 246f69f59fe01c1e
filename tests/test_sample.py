"""sample.py: the sampler against exact solutions, guidance, and image i being image i."""

import json
import math
import pathlib
import runpy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import config, randomise
from PIL import Image

import data
import model
import sample


@pytest.fixture
def checkpoint(tmp_path):
    """A random network of T/2 on 3 x 8 x 8, 10 classes, saved as train.py does."""

    def make(name='x.pt', **changes):
        cfg = config(**changes)
        torch.save({'ema': randomise(model.Net(cfg)).state_dict(), 'step': 1, 'config': cfg}, tmp_path / name)
        return tmp_path / name

    return make


# ------------------------------------------------------------------------------------------------- sampler


def test_noise_levels():
    t = sample.noise_levels(40)
    assert len(t) == 41 and t[-1] == 0
    assert t[0] == pytest.approx(80) and t[39] == pytest.approx(0.002)
    for i in range(40):  # EDM eq. 5
        assert t[i] == pytest.approx((80 ** (1 / 7) + i / 39 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7)


def gaussian(s):
    """The exact denoiser of data N(0, s^2), and the exact end of the ODE that starts at unit noise z."""
    return (lambda x, sigma: s**2 / (s**2 + sigma**2) * x), lambda z: 80 * z * s / math.sqrt(s**2 + 80**2)


def test_sampler_is_of_second_order():
    """Halving the steps quarters the error, where the solution is known."""
    D, exact = gaussian(0.5)
    z = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(2, 1, 2, 2)
    ends = [sample.edm_sampler(D, z, sample.noise_levels(steps)) for steps in (40, 80, 160)]
    errors = [(end - exact(z)).abs().max().item() for end in ends]
    assert 3.5 < errors[0] / errors[1] < 4.5 and 3.5 < errors[1] / errors[2] < 4.5
    limit = (4 * ends[2] - ends[1]) / 3  # Richardson: the h^2 term gone
    assert (limit - exact(z)).abs().max() < 1e-4


@pytest.mark.parametrize('steps, evaluations', [(2, 3), (18, 35), (40, 79)])
def test_evaluations(steps, evaluations):
    D, _ = gaussian(0.5)
    levels = []
    sample.edm_sampler(
        lambda x, sigma: levels.append(sigma) or D(x, sigma),
        torch.ones(1, 1, 1, 1, dtype=torch.float64),
        sample.noise_levels(steps),
    )
    assert len(levels) == evaluations


def test_the_state_keeps_its_precision():
    for dtype in (torch.float32, torch.float64):
        seen = []
        D, _ = gaussian(0.5)
        x = sample.edm_sampler(
            lambda x, sigma: seen.append(x.dtype) or D(x, sigma),
            torch.ones(1, 1, 1, 1, dtype=dtype),
            sample.noise_levels(4),
        )
        assert x.dtype == dtype and set(seen) == {dtype}


def test_churn_puts_back_as_much_noise_as_it_says():
    """Algorithm 2 keeps the distribution: data of deviation 0.5 come out, within 5 standard errors."""
    D, _ = gaussian(0.5)
    rng = torch.Generator().manual_seed(0)
    normal = lambda: torch.randn(20_000, 1, 1, 1, generator=rng, dtype=torch.float64)
    z = normal()
    x = sample.edm_sampler(D, z, sample.noise_levels(40), S_churn=40.0, fresh_noise=normal)
    plain = sample.edm_sampler(D, z, sample.noise_levels(40))
    assert x.std().item() == pytest.approx(plain.std().item(), rel=5 / math.sqrt(2 * 20_000) + 0.01)
    assert np.corrcoef(x.flatten(), plain.flatten())[0, 1] < 0.5  # and it did put noise in
    half = sample.edm_sampler(D, z, sample.noise_levels(40), S_churn=40.0, S_noise=0.0, fresh_noise=normal)
    assert half.std() < 0.45  # levels raised, no noise added


def test_churn_only_between_S_min_and_S_max():
    D, _ = gaussian(0.5)
    z = torch.ones(2, 1, 2, 2, dtype=torch.float64)
    asked = []
    fresh = lambda: asked.append(1) or torch.zeros_like(z)
    sample.edm_sampler(D, z, sample.noise_levels(20), S_churn=5.0, S_min=0.1, S_max=1.0, fresh_noise=fresh)
    assert len(asked) == sum(0.1 <= t <= 1.0 for t in sample.noise_levels(20))
    levels = []
    sample.edm_sampler(
        lambda x, s: levels.append(s) or D(x, s), z, sample.noise_levels(20), S_churn=100.0, fresh_noise=fresh
    )
    assert levels[0] == pytest.approx(80 * math.sqrt(2))  # gamma is capped at sqrt(2) - 1


@pytest.mark.parametrize('steps', [1, 0, -3])
def test_too_few_steps_are_refused(steps):
    with pytest.raises(data.BadInput, match='at least 2'):
        sample.noise_levels(steps)


# ------------------------------------------------------------------------------------------------ guidance


def test_guidance_is_on_every_channel_and_in_one_call():
    cfg = config(channels=4)
    net = randomise(model.Net(cfg).double())
    x, y = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.tensor([1, 5, 9])
    sigma = torch.full((3,), 0.7, dtype=torch.float64)
    with torch.no_grad():
        D_y = model.denoise(net, x, sigma, y, cfg)
        D_null = model.denoise(net, x, sigma, torch.full((3,), 10), cfg)
    calls = []
    counted = lambda *args: calls.append(len(args[0])) or net(*args)
    with torch.no_grad():
        D_w = sample.guided(counted, y, lambda sigma: 3.0, cfg)(x, 0.7)
    assert calls == [6]
    assert torch.allclose(D_w, D_null + 3 * (D_y - D_null), atol=1e-12)
    assert ((D_w - D_y).abs().amax((0, 2, 3)) > 1e-3).all()


def test_weight_one_is_no_guidance():
    cfg = config()
    net = randomise(model.Net(cfg).double())
    kwargs = dict(seed=0, indices=[0, 1], labels=[3, 4], steps=4)
    plain = sample.generate(net, cfg, **kwargs)
    assert (plain - sample.generate(net, cfg, w=lambda sigma: 1 + 1e-12, **kwargs)).abs().max() < 1e-9
    assert (plain - sample.generate(net, cfg, w=lambda sigma: 3.0, **kwargs)).abs().max() > 1e-2


def test_power_cosine():
    """1 + (w - 1) (1 - cos(pi u^s)) / 2 at u = 0, 0.5, 0.75, 1, where u = i / (N - 1) belongs to t_i."""
    w = sample.guidance(3.8, config(), power=4.0)
    t = sample.noise_levels(5)
    assert [w(t[i]) for i in (0, 2, 3, 4)] == pytest.approx([1.0, 1.026901, 1.636545, 3.8], abs=1e-6)
    t = sample.noise_levels(40)
    assert all(a < b for a, b in zip([w(s) for s in t[:40]], [w(s) for s in t[1:40]]))
    assert w(100.0) == 1.0  # churn may go above sigma_max
    assert sample.guidance(3.8, config(), power=1.0)(sample.noise_levels(3)[1]) == pytest.approx(2.4)


def test_power_cosine_of_wrapped_ddpm_follows_its_steps():
    w = sample.guidance(3.8, config(diffusion='ddpm'), power=4.0)
    sigmas = model.ddpm_sigmas()
    assert [w(sigmas[t].item()) for t in (999, 750, 500, 250, 100, 0)] == pytest.approx(
        [1.000000, 1.000105, 1.026901, 1.636545, 3.059374, 3.8], abs=2e-6
    )


def test_guidance_in_an_interval_costs_nothing_outside():
    cfg = config()
    net = randomise(model.Net(cfg))
    sizes = []
    look = lambda net, x, levels, y, cfg: (
        sizes.append((levels[0].item(), len(x))) or model.denoise(net, x, levels, y, cfg)
    )
    D = sample.guided(net, torch.tensor([1, 2]), sample.guidance(3.0, cfg, interval=(0.2, 2.0)), cfg, look)
    with torch.no_grad():
        sample.edm_sampler(D, torch.randn(2, 3, 8, 8), sample.noise_levels(20))
    assert len(sizes) == 39 and {size for _, size in sizes} == {2, 4}
    assert all((size == 4) == (0.2 < level <= 2.0) for level, size in sizes)


def test_an_interval_costs_93_rows_an_image_where_guidance_everywhere_costs_158():
    """79 evaluations, 14 of them in (0.19, 1.61]; a net that counts its rows and their images' sizes."""
    cfg, rows = config(), []

    class Counting(model.Net):
        def forward(self, x, c_noise, y, *rest):
            rows.append(len(x))
            return torch.zeros_like(x), None, None

    counting = Counting(cfg)
    for w, interval, total in ((1.0, None, 79), (3.0, (0.19, 1.61), 93), (3.0, None, 158)):
        rows.clear()
        sample.generate(counting, cfg, 0, range(3), [0, 1, 2], 40, sample.guidance(w, cfg, interval))
        assert len(rows) == 79 and sum(rows) == 3 * total


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize(
    'capability, bf16, precision',
    [((9, 0), True, torch.bfloat16), ((7, 0), False, torch.float16), ((6, 1), False, torch.float32)],
)
def test_precision_of_gpus(capability, bf16, precision, monkeypatch):
    """H200, V100 and a GTX 1080, whose float16 is slower than its float32."""
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: bf16)
    assert sample.pick_precision('auto', torch.device('cuda')) == precision
    assert sample.pick_precision('fp32', torch.device('cuda')) == torch.float32


@pytest.mark.parametrize('precision, bound', [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_weights_cast_once_give_the_same_bits_as_autocast(precision, bound):
    """And both the pictures of float32 to a few hundredths or thousandths, with the same seed."""
    cfg = config()
    torch.manual_seed(0)
    net = randomise(model.Net(cfg)).requires_grad_(False)
    make = lambda *precision: sample.generate(net, cfg, 0, range(2), [0, 1], 8, lambda sigma: 2.0, *precision)
    exact, cast_at_every_call = make(), make(precision)
    sample.make_ready(net, precision)
    assert net.blocks[0].fc1.weight.dtype == precision and exact.dtype == torch.float64
    assert torch.equal(make(precision), cast_at_every_call)
    assert 0 < (cast_at_every_call - exact).norm() < bound * exact.norm()


@pytest.mark.slow
def test_compiled_sampling_makes_the_same_pictures(checkpoint, tmp_path):
    """The compiler takes half a minute to start. Two sizes of batches, with and without guidance."""
    path, made = checkpoint(), []
    flags = [str(path), '-n', '5', '--steps', '4', '--batch', '3', '--precision', 'fp32', '--cfg', '2']
    for extra in ([], ['--compile']):
        sample.main([*flags, '--cfg-interval', '0.1', '10', '--npz', str(tmp_path / f'{extra}.npz'), *extra])
        made.append(np.load(tmp_path / f'{extra}.npz')['arr_0'].astype(int))
    assert abs(made[0] - made[1]).max() <= 1 and made[0].std() > 10


# ---------------------------------------------------------------------------------------------- inpainting


@pytest.fixture
def photo(tmp_path):
    """An 8 x 8 picture, and a mask whose white pixels touch 5 of the 16 tokens."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / 'photo.png')
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 255  # tokens 5, 6, 9, 10
    mask[0, 0] = 255  # a corner of token 0
    Image.fromarray(mask).save(tmp_path / 'mask.png')
    return tmp_path / 'photo.png', tmp_path / 'mask.png'


@pytest.mark.parametrize('method', ['mdt', 'maskdit', 'mcdit'])
def test_inpainting_keeps_what_is_known(method, checkpoint, photo, tmp_path):
    path = checkpoint(**config(method))
    arguments = [
        str(path),
        '-n',
        '3',
        '--steps',
        '4',
        '--cfg',
        '2',
        '--inpaint',
        str(photo[0]),
        '--mask',
        str(photo[1]),
    ]
    sample.main([*arguments, '--npz', str(tmp_path / 'a.npz')])
    with np.load(tmp_path / 'a.npz') as file:
        images, settings = file['arr_0'].astype(int), json.loads(str(file['settings']))
    assert settings['mask'] == str(photo[1]) and settings['fill_steps'] == (None if method == 'mcdit' else 1)
    original = np.asarray(Image.open(photo[0])).astype(int)
    unknown = np.zeros((4, 4), bool)
    unknown[1:3, 1:3] = unknown[0, 0] = True
    pixels = unknown.repeat(2, 0).repeat(2, 1)
    assert (images[:, ~pixels] == original[~pixels]).all()
    for image in images:
        assert (image[pixels] != original[pixels]).mean() > 0.9
    assert (images[0][pixels] != images[1][pixels]).any()


def test_the_mask_is_cropped_as_the_picture_and_any_white_counts(photo, tmp_path):
    cfg = config('mcdit', resolution=8)
    Image.new('RGB', (16, 8)).save(tmp_path / 'wide.png')
    white = np.zeros((8, 16), np.uint8)
    white[0, 11] = 255                                                        # column 7 of the square
    Image.fromarray(white).save(tmp_path / 'mask.png')
    args = sample.parse(['x', '--inpaint', str(tmp_path / 'wide.png'), '--mask', str(tmp_path / 'mask.png')])
    assert (~sample.read_inpainting(args, cfg)[1]).nonzero().flatten().tolist() == [3]
    white = np.zeros((256, 256), np.uint8)
    white[70, 130] = 255  # one pixel of 64 x 64
    Image.fromarray(white).save(tmp_path / 'mask.png')
    assert (~sample.read_inpainting(args, cfg)[1]).nonzero().flatten().tolist() == [4 + 2]
    Image.fromarray(np.array([[255, 0], [0, 0]], np.uint8)).save(tmp_path / 'mask.png')       # 2 x 2 pixels
    assert (~sample.read_inpainting(args, cfg)[1]).nonzero().flatten().tolist() == [0, 1, 4, 5]


def looks(method, fill_steps, steps=4):
    """What the network was given at each evaluation of an inpainting: (sigma, x, visible, patches)."""
    cfg = config(method)
    net = randomise(model.Net(cfg))
    rng = torch.Generator().manual_seed(0)
    x0 = torch.randn(1, 3, 8, 8, generator=rng, dtype=torch.float64)
    known = torch.arange(16) % 3 > 0
    noise = torch.randn(2, 3, 8, 8, generator=rng, dtype=torch.float64)
    t = sample.noise_levels(steps)
    look, hold = sample.inpainting(cfg, x0, known, noise, t, fill_steps)
    seen = []

    def spy(x, c_noise, y, visible, patches):
        seen.append((c_noise.mul(4).exp()[0].item(), x, visible, patches))
        return net(x, c_noise, y, visible, patches)

    spy.pos = net.pos
    D = sample.guided(spy, torch.tensor([1, 2]), sample.guidance(1.0, cfg), cfg, look)
    with torch.no_grad():
        end = sample.edm_sampler(D, noise, t, hold=hold)
    return cfg, x0, known, noise, t, seen, end


@pytest.mark.parametrize('method', ['mdt', 'maskdit'])
@pytest.mark.parametrize('fill_steps', [0, 1, 4])
def test_mdt_fills_first_and_then_goes_on_as_usual(method, fill_steps):
    """Known tokens are visible and held at x0 + sigma z; the masked path runs at the levels above t_k."""
    cfg, x0, known, noise, t, seen, end = looks(method, fill_steps)
    assert len(seen) == 7
    for sigma, scaled, visible, _ in seen:
        assert (visible is not None) == (sigma > t[fill_steps] * (1 + 1e-9))
        if visible is not None:
            assert visible.tolist() == [known.nonzero().flatten().tolist()] * 2
        held = model.patchify(scaled * math.sqrt(sigma**2 + 0.25) - x0 - sigma * noise, 2)[:, known]
        assert held.abs().max() < 1e-9 * max(sigma, 1)
    assert torch.equal(model.patchify(end, 2)[:, known], model.patchify(x0, 2).expand(2, -1, -1)[:, known])


def test_mcdit_turns_the_roles():
    """Unknown tokens are the visible noisy ones, known ones the clean fill; nothing is noised again."""
    cfg, x0, known, noise, t, seen, end = looks('mcdit', 1)
    for sigma, scaled, visible, patches in seen:
        assert visible.tolist() == [(~known).nonzero().flatten().tolist()] * 2
        assert torch.allclose(patches.double(), model.patchify(x0 / 0.5, 2).expand(2, -1, -1), atol=1e-6)
        held = model.patchify(scaled * math.sqrt(sigma**2 + 0.25) - x0, 2)[:, known]
        assert held.abs().max() < 1e-9
    assert torch.equal(model.patchify(end, 2)[:, known], model.patchify(x0, 2).expand(2, -1, -1)[:, known])


# ----------------------------------------------------------------------------------------- image i is image i


def test_image_i_does_not_depend_on_the_batch():
    cfg = config()
    net = randomise(model.Net(cfg))
    labels = [sample.label_of(0, i, list(range(10)), False) for i in range(6)]
    for churn in ({}, {'S_churn': 10.0}):
        whole = sample.generate(net, cfg, 0, range(6), labels, 5, lambda sigma: 2.0, **churn)
        for batch in ([4], [5, 2], [0, 1, 2, 3]):
            part = sample.generate(
                net, cfg, 0, batch, [labels[i] for i in batch], 5, lambda sigma: 2.0, **churn
            )
            levels = data.to_uint8(part).int() - data.to_uint8(whole[batch]).int()
            assert levels.abs().max() <= 1
            assert (part - whole[batch]).abs().max() < 1e-3
        assert (whole[0] - whole[1]).abs().max() > 0.1


def test_noise_of_an_image_is_bit_equal_and_of_unit_variance():
    a, b = (sample.noise_source(3, 8).standard_normal((3, 8, 8)) for _ in range(2))
    assert np.array_equal(a, b)
    many = np.stack([sample.noise_source(3, i).standard_normal(64) for i in range(1000)])
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02
    assert not np.array_equal(many[0], sample.noise_source(4, 0).standard_normal(64))


def test_labels():
    allowed = [2, 5, 7]
    assert [sample.label_of(0, i, allowed, True) for i in range(5)] == [2, 5, 7, 2, 5]
    random = [sample.label_of(0, i, allowed, False) for i in range(3000)]
    assert random == [sample.label_of(0, i, allowed, False) for i in range(3000)]
    counts = np.bincount(random, minlength=8)[allowed]
    assert counts.sum() == 3000 and abs(counts - 1000).max() < 130  # 5 standard errors


# ------------------------------------------------------------------------------------------------- command


def test_npz_png_and_grid(checkpoint, tmp_path):
    path = checkpoint()
    arguments = [str(path), '--n', '5', '--steps', '3', '--batch', '2', '--seed', '4', '--precision', 'fp32']
    sample.main(
        [
            *arguments,
            '--npz',
            str(tmp_path / 'a.npz'),
            '--png',
            str(tmp_path / 'png'),
            '--class',
            '3',
            '7',
            '--balanced',
        ]
    )
    with np.load(tmp_path / 'a.npz') as file:
        images, labels, settings = file['arr_0'], file['arr_1'], json.loads(str(file['settings']))
    assert images.dtype == np.uint8 and images.shape == (5, 8, 8, 3) and labels.tolist() == [3, 7, 3, 7, 3]
    assert settings['labels'] == 'balanced' and settings['steps'] == 3 and settings['cfg'] == 1.0
    assert [settings[name] for name in ('precision', 'mask', 'fill_steps')] == ['float32', None, None]
    for i in range(5):
        assert np.array_equal(np.asarray(Image.open(tmp_path / 'png' / f'{i:06d}.png')), images[i])
    net, cfg = model.load_net(path)
    again = (
        data.to_uint8(sample.generate(net, cfg, 4, range(5), labels.tolist(), 3)).permute(0, 2, 3, 1).numpy()
    )
    assert abs(again.astype(int) - images).max() <= 1
    assert Image.open(tmp_path / 'x-samples.png').size[0] > 5 * 64
    assert not list(tmp_path.glob('*partial*')) + list(tmp_path.glob('*tmp*'))


def test_labels_at_random_are_said_to_be(checkpoint, tmp_path):
    sample.main([str(checkpoint()), '--n', '3', '--steps', '2', '--npz', str(tmp_path / 'a.npz')])
    with np.load(tmp_path / 'a.npz') as file:
        assert json.loads(str(file['settings']))['labels'] == 'uniform at random'
        assert file['arr_1'].tolist() == [sample.label_of(0, i, list(range(10)), False) for i in range(3)]


def test_unconditional_and_latent_checkpoints(checkpoint, tmp_path):
    sample.main(
        [
            str(checkpoint(classes=0, class_names=[])),
            '--n',
            '2',
            '--steps',
            '2',
            '--out',
            str(tmp_path / 'u.png'),
        ]
    )
    flags = ['--latents', '--n', '2', '--steps', '2', '--out', str(tmp_path / 'l.png')]
    sample.main([str(checkpoint(channels=4)), *flags])
    assert (tmp_path / 'u.png').exists() and (tmp_path / 'l.png').exists()


def test_latents_are_kept_as_they_are(checkpoint, tmp_path):
    path = checkpoint(channels=4)
    flags = ['-n', '3', '--steps', '3', '--precision', 'fp32', '--latents']
    sample.main([str(path), *flags, '--npz', str(tmp_path / 'a.npz')])
    net, cfg = model.load_net(path)
    with np.load(tmp_path / 'a.npz') as file:
        assert file['latents'].dtype == np.float32 and 'arr_0' not in file
        made = sample.generate(net, cfg, 0, range(3), file['arr_1'].tolist(), 3)
        assert np.allclose(file['latents'], made, atol=1e-5)


def test_a_diverged_network_writes_nothing(checkpoint, tmp_path):
    path = checkpoint()
    state = torch.load(path, weights_only=True)
    state['ema']['final.linear.bias'][:] = torch.nan
    torch.save(state, path)
    flags = ['--n', '2', '--steps', '2', '--npz', str(tmp_path / 'a.npz'), '--precision']
    for precision, why in (('fp32', 'the network has diverged'), ('fp16', 'try --precision fp32')):
        with pytest.raises(data.BadInput, match=rf'image 0 of --seed 0, label \d, is not finite: .*{why}'):
            sample.main([str(path), *flags, precision])
    assert [file.name for file in tmp_path.iterdir()] == ['x.pt']


@pytest.mark.parametrize('channels, flags', [(3, []), (4, ['--latents'])])
def test_an_image_that_is_not_finite_is_named(channels, flags, checkpoint, monkeypatch):
    """The last of two batches, the last channel: of latents only the first three are shown."""
    def generate(net, cfg, seed, indices, *rest, **churn):
        x = torch.zeros(len(indices), channels, 8, 8)
        x[[i == 3 for i in indices], -1, 7, 7] = math.inf
        return x

    monkeypatch.setattr(sample, 'generate', generate)
    flags = [*flags, '-n', '4', '--batch', '2', '--seed', '5', '--class', '7']
    with pytest.raises(data.BadInput, match='image 3 of --seed 5, label 7, is not finite'):
        sample.main([str(checkpoint(channels=channels)), *flags])


@pytest.mark.parametrize(
    'flags, words',
    [
        (['-n', '6', '--batch', '5'], '5 images at a time: type --batch 2$'),
        (['-n', '3', '--cfg', '2'], '3 images at a time, each twice for guidance: type --batch 1$'),
        (['-n', '1'], '1 images at a time: use a larger one$'),
    ],
)
def test_a_gpu_without_memory_is_told_what_fits(flags, words, checkpoint, tmp_path, monkeypatch):
    def generate(*args, **churn):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(sample, 'generate', generate)
    with pytest.raises(data.BadInput, match=words):
        sample.main([str(checkpoint()), *flags])
    assert [file.name for file in tmp_path.iterdir()] == ['x.pt']


def test_nothing_is_left_however_a_run_ends_and_two_of_a_checkpoint_do_not_meet(
    checkpoint, tmp_path, monkeypatch
):
    """While images are made, no file of theirs has a name; another run goes through between two batches."""
    flags = [str(checkpoint()), '-n', '2', '--steps', '2', '--batch', '1']
    grid = pathlib.Path(sample.main(flags))
    alone, generate, seen = grid.read_bytes(), sample.generate, []

    def meanwhile(*args, **churn):
        seen.append(sorted(file.name for file in tmp_path.iterdir()))
        if len(seen) == 2:
            sample.main([*flags, '--seed', '1'])
        return generate(*args, **churn)

    monkeypatch.setattr(sample, 'generate', meanwhile)
    sample.main(flags)
    assert seen == [['x-samples.png', 'x.pt']] * 4 and grid.read_bytes() == alone


def test_room_is_looked_for_first(checkpoint, tmp_path, monkeypatch):
    """5 images of 192 bytes, and as much again for the .npz."""
    flags = [str(checkpoint()), '-n', '5', '--steps', '2']
    for free in (959, 1919):
        usage = data.shutil._ntuple_diskusage(9, 9, free)
        monkeypatch.setattr(data.shutil, 'disk_usage', lambda place: usage)
        with pytest.raises(data.BadInput, match='a.npz needs 0.0 MB and its disk has 0.0 MB free'):
            sample.main([*flags, '--npz', str(tmp_path / 'a.npz'), '--png', str(tmp_path / 'png')])
    assert [file.name for file in tmp_path.iterdir()] == ['x.pt']
    sample.main(flags)


def test_a_disk_that_fills_is_told_with_what_did_not_fit(checkpoint, tmp_path, monkeypatch):
    def savez(file, **arrays):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(np, 'savez', savez)
    with pytest.raises(data.BadInput, match=r'cannot write .*/a.npz: No space left .*: choose another --npz'):
        sample.main([str(checkpoint()), '-n', '1', '--steps', '2', '--npz', str(tmp_path / 'a.npz')])
    assert [file.name for file in tmp_path.iterdir()] == ['x.pt']


def pretend(monkeypatch, rank, failed=0):
    """To be one of two processes; what the other says. Returns [what this one has said]."""
    said = []
    monkeypatch.setattr(data, 'where_am_i', lambda gpu: (rank, 2, torch.device('cpu')))
    monkeypatch.setattr(dist, 'all_reduce', lambda flag: said.append(flag.item()) or flag.add_(failed))
    monkeypatch.setattr(dist, 'broadcast_object_list', lambda made, source: None)
    return said


def test_nobody_waits_while_process_0_writes(checkpoint, tmp_path, monkeypatch):
    pretend(monkeypatch, 0)
    waits = []
    monkeypatch.setattr(dist, 'barrier', lambda: waits.append((tmp_path / 'x-samples.png').exists()))
    sample.main([str(checkpoint()), '-n', '2', '--steps', '2'])
    assert waits == [False, False]                              # for the file's opening, and for the images


@pytest.mark.parametrize('rank, words', [(0, 'cannot write .*/file: File exists'), (1, 'another process')])
def test_a_mistake_of_process_0_stops_all(rank, words, checkpoint, tmp_path, monkeypatch):
    said = pretend(monkeypatch, rank, failed=rank)
    (tmp_path / 'file').write_text('')
    with pytest.raises(data.BadInput, match=words):
        sample.main([str(checkpoint()), '-n', '2', '--png', str(tmp_path / 'file')])
    assert said == [rank == 0] and sorted(file.name for file in tmp_path.iterdir()) == ['file', 'x.pt']


def test_several_machines_are_refused(checkpoint, monkeypatch):
    pretend(monkeypatch, 0)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '1')
    with pytest.raises(data.BadInput, match='file of one machine, and 1 of 2 processes'):
        sample.main([str(checkpoint())])


@pytest.mark.parametrize(
    'argv, words',
    [
        (['x.pt', '--steps', '1'], 'at least 2 steps'),
        (['x.pt', '--n', '0'], 'at least 1'),
        (['x.pt', '--class', '10'], 'classes 0 to 9'),
        (['u.pt', '--class', '1'], 'knows no classes'),
        (['u.pt', '--cfg', '2'], 'needs classes'),
        (['x.pt', '--cfg-power', '4'], 'type its weight'),
        (['x.pt', '--cfg', '3', '--cfg-interval', '2', '1'], 'a low and a high'),
        (['x.pt', '--cfg', '3', '--cfg-interval', '1', '2', '--cfg-power', '4'], 'not allowed with'),
        (['x.pt', '--inpaint', 'photo.png'], 'go together'),
        (['x.pt', '--fill-steps', '1'], 'is for --inpaint'),
        (
            ['x.pt', '--inpaint', 'photo.png', '--mask', 'mask.png', '--fill-steps', '1'],
            'with mdt or maskdit',
        ),
        (['x.pt', '--inpaint', 'file', '--mask', 'mask.png'], 'cannot be read'),
        (['x.pt', '--inpaint', 'photo.png', '--mask', 'mask.png', '--S-churn', '1'], 'leave one out'),
        (['x.pt', '--S-noise', 'nan'], 'at least 0'),
        (['x.pt', '--S-noise', '1.003'], 'shape the noise of --S-churn, and that is 0'),
        (['x.pt', '--S-min', '0.05', '--S-max', '50'], 'shape the noise of --S-churn, and that is 0'),
        (['x.pt', '--out', 'x.pt'], 'ends in .png'),
        (['x.pt', '--out', 'full.png'], 'ends in .png'),
        (['x.pt', '--inpaint', 'photo.png', '--mask', 'black.png'], 'all black'),
        (
            ['d.pt', '--inpaint', 'photo.png', '--mask', 'mask.png'],
            'needs a checkpoint of mdt, maskdit or mcdit',
        ),
        (['t.pt', '--inpaint', 'photo.png', '--mask', 'mask.png'], 'mcdit, tuned'),
        (['noisy.pt', '--inpaint', 'photo.png', '--mask', 'mask.png'], 'on one kind alone, by --tokens'),
        (['l.pt', '--latents', '--inpaint', 'photo.png', '--mask', 'mask.png'], 'latents as an .npy'),
        (['l.pt', '--latents', '--png', 'png'], '--latents makes none'),
        (['l.pt'], 'name the VAE that decodes them with --vae, such as diffusion_pytorch_model'),
        (['l.pt', '--vae', 'gone.safetensors'], 'no VAE gone.safetensors: name one with --vae, such as'),
        (['m.pt'], 'no VAE moved/vae.safetensors: name one with --vae, such as diffusion_py'),
        (['l.pt', '--vae', 'file'], 'neither a safetensors nor a torch file'),
        (['l.pt', '--vae', 'x.pt'], '248 missing'),
        (['l.pt', '--vae', 'file', '--latents'], 'not allowed with'),
        (['three.pt'], 'latents of 3 channels, and the VAE decodes 4'),
        (['x.pt', '--vae', 'vae.safetensors'], 'this one makes pictures'),
        (['x.pt', '--latents'], 'this one makes pictures'),
        (['x.pt', '--npz', 'there.npz'], 'exists already'),
        (
            ['x.pt', '--inpaint', 'photo.png', '--mask', 'mask.png', '--out', 'photo.png'],
            'photo.png exists already: remove it, or choose another --out',
        ),
        (['x.pt', '--png', 'full'], 'not empty'),
        (
            ['x.pt', '--n', '1', '--steps', '2', '--npz', 'file/a.npz'],
            'cannot write file/a.npz: Not a directory: choose another --npz',
        ),
        (
            ['x.pt', '--n', '1', '--steps', '2', '--out', 'file/a.png'],
            'cannot write file/a.png: Not a directory: choose another --out',
        ),
        (
            ['x.pt', '--n', '1', '--steps', '2', '--png', 'file/png'],
            'cannot write file/png: Not a directory: choose another --png',
        ),
        (['none.pt'], 'no checkpoint'),
        (['there.npz'], 'not a checkpoint'),
        (['x.pt', '--precision', 'fp8'], 'invalid choice'),
        (['x.pt', '--step', '3'], 'unrecognized arguments'),
    ],
)
def test_refusals_exit_with_2_and_write_nothing(
    argv, words, checkpoint, photo, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    checkpoint('x.pt')
    checkpoint('u.pt', classes=0, class_names=[])
    checkpoint('l.pt', channels=4)
    checkpoint('m.pt', channels=4, kind='moments', vae='moved/vae.safetensors')
    checkpoint('three.pt', kind='latents')
    checkpoint('d.pt', method='dit')
    checkpoint('t.pt', stage='tune')
    checkpoint('noisy.pt', tokens='noisy')
    Image.new('L', (8, 8), 0).save('black.png')
    (tmp_path / 'there.npz').write_bytes(b'precious')
    (tmp_path / 'file').write_text('')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full.png').mkdir()
    (tmp_path / 'full' / 'a').write_text('')
    before = sorted(tmp_path.rglob('*'))
    monkeypatch.setattr('sys.argv', ['sample.py', *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(sample.__file__, run_name='__main__')
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and 'Traceback' not in error
    assert sorted(tmp_path.rglob('*')) == before
    assert pathlib.Path('there.npz').read_bytes() == b'precious'
