"""sample.py: the sampler against exact solutions and EDM's algorithm in scalars, guidance, inpainting, image
i being image i, and the files, also of a killed run."""

import dataclasses
import json
import math
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model
import sample


def small(method='mcdit', **changes):
    """A T/2 on 3 x 8 x 8 images of 10 classes, so N = 16 tokens."""
    fields = dict(method=method, model='T/2', resolution=8, channels=3, classes=10)
    return model.Config(**fields | {'mask_ratio': model.METHODS[method].mask_ratio} | changes)


def random_net(cfg):
    """Random numbers in every parameter: with zero gates most tests would pass without a network."""
    net, rng = model.Net(cfg), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    return net.eval().requires_grad_(False)


def save(path, cfg, net=None):
    """A checkpoint as train.py writes it."""
    weights = (net or random_net(cfg)).state_dict()
    torch.save({'ema': weights, 'step': 1, 'config': dataclasses.asdict(cfg)}, path)
    return path


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp('checkpoint') / 'x.pt', small())


def run(checkpoint, flags, **more):
    """sample.py with flags as one string, and with {name} in it from `more`."""
    return sample.main([str(checkpoint), *flags.format(**more).split()])


# ------------------------------------------------------------------------------------------------- sampler

def test_noise_levels():
    t = sample.noise_levels(40)
    assert len(t) == 41 and t[-1] == 0
    assert t[0] == pytest.approx(80) and t[39] == pytest.approx(0.002)
    for i in range(40):                                                       # EDM eq. 5
        assert t[i] == pytest.approx((80 ** (1 / 7) + i / 39 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7)


def gaussian(x, sigma, s=0.5):
    """The exact denoiser of data N(0, s^2)."""
    return s ** 2 / (s ** 2 + sigma ** 2) * x


def test_sampler_is_of_second_order():
    """Halving the steps quarters the error, where the solution is known."""
    z = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(2, 1, 2, 2)
    exact = 80 * z * 0.5 / math.sqrt(0.5 ** 2 + 80 ** 2)
    ends = [sample.edm_sampler(gaussian, z, sample.noise_levels(N)) for N in (40, 80, 160)]
    errors = [(end - exact).abs().max().item() for end in ends]
    assert 3.5 < errors[0] / errors[1] < 4.5 and 3.5 < errors[1] / errors[2] < 4.5
    assert ((4 * ends[2] - ends[1]) / 3 - exact).abs().max() < 1e-4           # Richardson: the h^2 term gone


def test_the_network_is_asked_at_edms_noise_levels():
    """Twice in each step, at its two ends; once in the last. The state keeps the precision of the noise."""
    for dtype in (torch.float32, torch.float64):
        levels, steps, t = [], [], sample.noise_levels(4)
        x = sample.edm_sampler(lambda x, sigma: levels.append((sigma, x.dtype)) or gaussian(x, sigma),
                               torch.ones(1, 1, 1, 1, dtype=dtype), t, on_step=lambda: steps.append(1))
        assert levels == [(sigma, dtype) for sigma in (t[0], t[1], t[1], t[2], t[2], t[3], t[3])]
        assert x.dtype == dtype and len(steps) == 4


def algorithm_2(z, t, S_churn, S_tmin, S_tmax, S_noise, normals):
    """EDM Algorithm 2 for one number, line by line."""
    N = len(t) - 1
    x = t[0] * z
    for i in range(N):
        gamma = min(S_churn / N, math.sqrt(2) - 1) if S_tmin <= t[i] <= S_tmax else 0
        t_hat = t[i] + gamma * t[i]
        epsilon = S_noise * next(normals) if gamma else 0.0
        x_hat = x + math.sqrt(t_hat ** 2 - t[i] ** 2) * epsilon
        d = (x_hat - gaussian(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_prime = (x - gaussian(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_prime / 2)
    return x


@pytest.mark.parametrize('churn', [(5, 0, math.inf, 1), (40, 0.05, 50, 1.003), (1000, 0.1, 1, 0.5)])
def test_churn_is_edms_algorithm_2(churn):
    t, fresh = sample.noise_levels(20), np.random.default_rng(0).standard_normal(100)
    normals = iter(fresh)
    x = sample.edm_sampler(gaussian, torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64), t, churn,
                           lambda: torch.full((1, 1, 1, 1), next(normals), dtype=torch.float64))
    assert x.item() == pytest.approx(algorithm_2(0.7, t, *churn, iter(fresh)), rel=1e-12)


# ------------------------------------------------------------------------------------------------ guidance

def test_guidance_is_on_every_channel_and_in_one_call():
    cfg = small(channels=4)
    net = random_net(cfg).double()
    x, y, sigma = torch.randn(3, 4, 8, 8).double(), torch.tensor([1, 5, 9]), torch.full((3,), 0.7).double()
    D_y = model.denoise_images(net, x, sigma, y, cfg)
    D_null = model.denoise_images(net, x, sigma, torch.full((3,), 10), cfg)
    calls = []
    counted = lambda *args: calls.append(len(args[0])) or net(*args)
    D_w = sample.guided(counted, y, lambda sigma: 3.0, cfg)(x, float(sigma[0]))
    assert calls == [6]
    assert torch.allclose(D_w, D_null + 3 * (D_y - D_null), atol=1e-12)
    assert ((D_w - D_y).abs().amax((0, 2, 3)) > 1e-3).all()


def test_guidance_in_an_interval_costs_nothing_outside():
    """Kynkaanniemi et al.: 79 evaluations, of which 14 are in (0.19, 1.61] and on a double batch."""
    cfg, rows = small(), []

    class Counting(model.Net):
        def forward(self, x, c_noise, y, *rest):
            rows.append(((4 * c_noise[0]).exp().item(), len(x)))
            return torch.zeros_like(x), None, None

    counting = Counting(cfg)
    for scale, interval, total in ((1.0, None, 79), (3.0, (0.19, 1.61), 93), (3.0, None, 158)):
        rows.clear()
        sample.generate(counting, cfg, 0, range(3), [0, 1, 2], 40, sample.guidance(scale, cfg, interval))
        assert len(rows) == 79 and sum(B for _, B in rows) == 3 * total
        if interval:
            assert all((B == 6) == (0.19 < sigma <= 1.61) for sigma, B in rows)


def test_power_cosine():
    """1 + (w - 1) (1 - cos(pi u^s)) / 2 at u = 0, 0.5, 0.75, 1, where u = i / (N - 1) belongs to t_i."""
    w, t = sample.guidance(3.8, small(), power=4.0), sample.noise_levels(5)
    assert [w(t[i]) for i in (0, 2, 3, 4)] == pytest.approx([1.0, 1.026901, 1.636545, 3.8], abs=1e-6)
    assert w(100.0) == 1.0                                                    # churn may go above sigma_max
    assert sample.guidance(3.8, small(), power=1.0)(sample.noise_levels(3)[1]) == pytest.approx(2.4)
    w, sigmas = sample.guidance(3.8, small('dit', diffusion='ddpm'), power=4.0), model.ddpm_sigmas()
    assert [w(sigmas[t].item()) for t in (999, 750, 500, 250, 100, 0)] == pytest.approx(
        [1.000000, 1.000105, 1.026901, 1.636545, 3.059374, 3.8], abs=2e-6)    # u = 1 - t / 1000


# ---------------------------------------------------------------------------------------------- inpainting

@pytest.fixture(scope='module')
def photo(tmp_path_factory):
    """A folder with an 8 x 8 image, and a mask whose white pixels touch 5 of the 16 tokens."""
    folder = tmp_path_factory.mktemp('photo')
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / 'photo.png')
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 255                                                      # tokens 5, 6, 9, 10
    mask[0, 0] = 255                                                          # a corner of token 0
    Image.fromarray(mask).save(folder / 'mask.png')
    return folder


@pytest.mark.parametrize('method', ['mdt', 'maskdit', 'mcdit'])
@pytest.mark.parametrize('fill_steps', [0, 1, 4])
def test_inpainting(method, fill_steps):
    """What the network is given at each noise level, and what comes out, by METHODS' column `inpaint`."""
    cfg, rng, N = small(method), torch.Generator().manual_seed(0), 4
    net, known = random_net(cfg), torch.arange(16) % 3 > 0
    x0 = torch.randn(1, 3, 8, 8, generator=rng, dtype=torch.float64)
    noise = model.patchify(torch.from_numpy(np.stack([np.random.default_rng([7, i]).standard_normal((3, 8, 8))
                                                      for i in (3, 5)])), 2)
    seen, forward = [], net.forward
    net.forward = lambda *inputs: seen.append(inputs) or forward(*inputs)
    scale = lambda sigma: 2.0 if sigma < 1 else 1.0                           # some calls have a double batch
    end = sample.generate(net, cfg, 7, [3, 5], [1, 2], N, scale, inpaint=(x0, known, fill_steps))
    patches, levels = model.patchify(x0, 2), sample.noise_levels(N)
    assert len(seen) == 2 * N - 1 and {len(x) for x, *_ in seen} == {2, 4}
    for x, c_noise, y, visible, fill, _ in seen:
        sigma = (4 * c_noise[0]).exp().item()
        noised = x * math.sqrt(sigma ** 2 + 0.25)
        if method == 'mcdit':                                                 # 'context'
            assert visible.tolist() == [(~known).nonzero().flatten().tolist()] * len(x)
            assert torch.equal(fill, (patches / 0.5).expand(len(x), -1, -1))
        elif sigma > levels[fill_steps] * (1 + 1e-9):                         # 'visible': fills
            assert visible.tolist() == [known.nonzero().flatten().tolist()] * len(x)
        else:
            assert visible is None
        held = noised - patches - sigma * noise.repeat(len(x) // 2, 1, 1)
        assert held[:, known].abs().max() < 1e-9 * max(sigma, 1)
    assert torch.allclose(model.patchify(end, 2)[:, known], patches.expand(2, -1, -1)[:, known], atol=1e-14)


@pytest.mark.parametrize('method', ['maskdit', 'mcdit'])
def test_the_command_inpaints(method, photo, tmp_path):
    path = save(tmp_path / 'x.pt', small(method))
    run(path, '-n 3 --steps 4 --cfg 2 --inpaint {photo}/photo.png --mask {photo}/mask.png --npz {tmp}/a.npz',
        photo=photo, tmp=tmp_path)
    images = np.load(tmp_path / 'a.npz')['arr_0'].astype(int)
    original = np.asarray(Image.open(photo / 'photo.png')).astype(int)
    unknown = np.zeros((4, 4), bool)
    unknown[1:3, 1:3] = unknown[0, 0] = True
    pixels = unknown.repeat(2, 0).repeat(2, 1)
    assert (images[:, ~pixels] == original[~pixels]).all()
    assert all((image[pixels] != original[pixels]).mean() > 0.9 for image in images)
    assert (images[0][pixels] != images[1][pixels]).any()


def test_photo_and_mask_are_read_alike(photo, tmp_path):
    """A photo is turned as EXIF says and both are cropped to the central square; any white pixel counts."""
    def unknown(white, size=(16, 8)):
        mask = np.zeros(size[::-1], np.uint8)
        mask[white] = 255
        Image.fromarray(mask).save(tmp_path / 'mask.png')
        return (~sample.read_inpainting(tmp_path / 'wide.png', tmp_path / 'mask.png', small())[1]).nonzero()

    pixels = np.random.default_rng(0).integers(0, 255, (8, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'wide.png')
    assert unknown((0, 11)).tolist() == [[3]]                                 # column 7 of the square
    assert unknown((70, 130 + 128), (512, 256)).tolist() == [[6]]             # one pixel of 64 x 64
    assert unknown((0, 1), (4, 2)).flatten().tolist() == [0, 1, 4, 5]         # fewer pixels than tokens
    with pytest.raises(model.BadInput, match='mask.png is 8 x 8 and .* must have the same proportions'):
        unknown((0, 0), (8, 8))
    exif = Image.Exif()
    exif[274] = 6                                                             # the camera was held upright
    Image.fromarray(np.rot90(pixels).copy()).save(tmp_path / 'turned.png', exif=exif)
    unknown((0, 11))
    wide, turned = (sample.read_inpainting(tmp_path / name, tmp_path / 'mask.png', small())[0]
                    for name in ('wide.png', 'turned.png'))
    assert torch.equal(wide, turned) and wide.shape == (1, 3, 8, 8)
    assert torch.equal(wide[0], torch.from_numpy(pixels[:, 4:12].transpose(2, 0, 1)).double() / 127.5 - 1)


# ---------------------------------------------------------------------------------------- image i of a seed

def test_image_i_does_not_depend_on_the_batch():
    cfg = small()
    net, labels = random_net(cfg), [sample.label_of(0, i, list(range(10)), False) for i in range(6)]
    for churn in (sample.NO_CHURN, (10, 0, math.inf, 1)):
        make = lambda batch: sample.generate(net, cfg, 0, batch, [labels[i] for i in batch], 5,
                                             lambda sigma: 2.0, churn=churn)
        whole = make(range(6))
        for batch in ([4], [5, 2]):
            assert (make(batch) - whole[batch]).abs().max() < 1e-3
        assert (whole[0] - whole[1]).abs().max() > 0.1 and whole.dtype == torch.float64


def test_labels():
    assert [sample.label_of(0, i, [2, 5, 7], True) for i in range(5)] == [2, 5, 7, 2, 5]
    drawn = [sample.label_of(0, i, [2, 5, 7], False) for i in range(3000)]
    counts = np.bincount(drawn, minlength=8)[[2, 5, 7]]
    assert counts.sum() == 3000 and abs(counts - 1000).max() < 130            # 5 standard errors
    assert drawn[:9] == [sample.label_of(0, i, [2, 5, 7], False) for i in range(9)]


@pytest.mark.parametrize('precision, bound', [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_weights_cast_once_give_the_same_bits_as_autocast(precision, bound):
    """And both the images of float32 to a few hundredths or thousandths, with the same seed."""
    cfg = small()
    net = random_net(cfg)
    make = lambda *precision: sample.generate(net, cfg, 0, range(2), [0, 1], 4, lambda sigma: 2.0, *precision)
    exact, cast_at_every_call = make(), make(precision)
    sample.cast_weights(net, precision)
    assert torch.equal(make(precision), cast_at_every_call)
    assert 0 < (cast_at_every_call - exact).norm() < bound * exact.norm()


@pytest.mark.parametrize('capability, bf16, precision', [
    ((9, 0), True, torch.bfloat16), ((7, 0), False, torch.float16), ((6, 1), False, torch.float32)])
def test_precision_of_gpus(capability, bf16, precision, monkeypatch):
    """H200, V100 and a GTX 1080, whose float16 is slower than its float32."""
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: bf16)
    assert sample.pick_precision('auto', torch.device('cuda')) == precision
    assert sample.pick_precision('fp32', torch.device('cuda')) == torch.float32


# ------------------------------------------------------------------------------------------------- command

FLAGS = ('-n 7 --batch 2 --steps 3 --seed 4 --precision fp32 '
         '--npz {out}/a.npz --png {out}/png --out {out}/a.png')


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def whole(checkpoint, tmp_path_factory):
    """The folder that FLAGS fill when nobody disturbs them."""
    folder = tmp_path_factory.mktemp('whole')
    run(checkpoint, FLAGS, out=folder)
    return folder


def test_npz_png_and_grid(checkpoint, whole):
    with np.load(whole / 'a.npz') as file:
        images, labels, settings = file['arr_0'], file['arr_1'], json.loads(str(file['settings']))
    assert images.dtype == np.uint8 and images.shape == (7, 8, 8, 3)
    assert labels.tolist() == [sample.label_of(4, i, list(range(10)), False) for i in range(7)]
    assert settings['steps'] == 3 and settings['precision'] == 'torch.float32' and settings['cfg'] == 1.0
    net, cfg = model.load_net(checkpoint)
    again = sample.to_image(sample.generate(net, cfg, 4, range(7), labels.tolist(), 3)).permute(0, 2, 3, 1)
    assert abs(again.numpy().astype(int) - images).max() <= 1                 # other batches
    for i in range(7):
        assert np.array_equal(np.asarray(Image.open(whole / f'png/{i:06d}.png')), images[i])
    assert Image.open(whole / 'a.png').size[0] > 7 * 64
    assert sorted(path.name for path in whole.iterdir()) == ['a.npz', 'a.png', 'png']


def kill_at(call, function):
    """`function`, but at its call number `call` the process kills itself, having written half a file."""
    calls = []

    def killing(file, *rest, **more):
        calls.append(file)
        if len(calls) == call:
            if hasattr(file, 'write'):
                file.write(b'half')
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return function(file, *rest, **more)
    return killing


@pytest.mark.parametrize('owner, name, call, left', [(np, 'savez', 1, [0, 1, 2, 3]), (np, 'savez', 3, [2, 3]),
                                                     (np, 'savez', 5, []), (data, 'save_grid', 1, [])])
def test_a_killed_run_resumes(owner, name, call, left, checkpoint, whole, tmp_path, monkeypatch):
    """kill -9 in the first batch, in the third, in the .npz, before the grid: the same command then gives the
    same files as without it, and makes only the batches that were not finished."""
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, kill_at(call, getattr(owner, name)))
        fork = multiprocessing.get_context('fork')
        child = fork.Process(target=run, args=(checkpoint, FLAGS), kwargs={'out': tmp_path})
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL and not (tmp_path / 'a.png').exists()
    made, generate = [], sample.generate
    monkeypatch.setattr(sample, 'generate', lambda *args: made.append(args[3][0] // 2) or generate(*args))
    run(checkpoint, FLAGS, out=tmp_path)
    assert made == left and content(tmp_path) == content(whole)


def test_ranks_share_the_batches(checkpoint, whole, tmp_path, monkeypatch):
    """Rank 1 of 2 makes batches 1 and 3 and leaves; another command cannot resume; rank 0 makes the rest."""
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '1')
    run(checkpoint, FLAGS, out=tmp_path)
    before = content(tmp_path)
    assert sorted(before) == ['a.npz.partial/000001.npz', 'a.npz.partial/000003.npz']
    monkeypatch.setenv('RANK', '0')
    for other, words in (('--steps 4', 'steps was 3 and is now 4'), ('--png {out}', 'png was .*png and is')):
        with pytest.raises(model.BadInput, match=f'begun with other settings .{words}'):
            run(checkpoint, f'{FLAGS} {other}', out=tmp_path)
    assert content(tmp_path) == before
    run(checkpoint, FLAGS, out=tmp_path)
    assert content(tmp_path) == content(whole)


def test_latents_are_kept_as_they_are(tmp_path):
    cfg = small(channels=4, classes=0)
    net = random_net(cfg)
    path = save(tmp_path / 'x.pt', cfg, net)
    run(path, '-n 3 --steps 3 --precision fp32 --latents --npz {out}/a.npz', out=tmp_path)
    with np.load(tmp_path / 'a.npz') as file:
        assert file['latents'].dtype == np.float32 and 'arr_0' not in file
        assert np.allclose(file['latents'], sample.generate(net, cfg, 0, range(3), [0] * 3, 3), atol=1e-5)
    assert Image.open(tmp_path / 'x-samples.png').size[0] > 3 * 64            # a look at three channels


def test_a_diverged_network_writes_nothing(tmp_path):
    net = random_net(small())
    net.decoder.final.linear.bias[-1] = math.nan
    path = save(tmp_path / 'x.pt', small(), net)
    with pytest.raises(model.BadInput, match='images 0 to 1 are not all finite: .*try --precision fp32'):
        run(path, '-n 2 --steps 2 --npz {out}/a.npz', out=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ['x.pt']


@pytest.mark.slow
def test_compiled_sampling_makes_the_same_images(checkpoint, tmp_path):
    """The compiler takes half a minute to start. Two sizes of batches, with and without guidance."""
    flags, made = '-n 5 --steps 4 --batch 3 --precision fp32 --cfg 2 --cfg-interval 0.1 10 --npz {out} ', []
    for extra in ('', '--compile'):
        run(checkpoint, flags + extra, out=tmp_path / f'{extra}.npz')
        made.append(np.load(tmp_path / f'{extra}.npz')['arr_0'].astype(int))
    assert abs(made[0] - made[1]).max() <= 1 and made[0].std() > 10
