"""The same training with nothing masked: the short tuning that closes the gap to inference.

    python finetune.py out/0400000.pt --out tuned                                # MC-DiT's appendix A.2
    torchrun --nproc_per_node 4 finetune.py out/0400000.pt --out tuned --batch 512
    python finetune.py DiT-XL-2-256x256.pt --data flowers --out tuned       # published weights, other classes

Masked training fills some of the decoder's slots with other things than the encoder's tokens (mdt in one of
its two passes), and sampling none. So the loss is now DiT's, over all tokens, through encoder and decoder.
What changes against train.py:

    mask ratio       0: no masked slots, so no parameters that fill them, and no EMA network beside `ema`
    weights          `model` and `ema` of the checkpoint, each continued
    optimizer        fresh; learning rate 5e-5, batch 128
    EMA warm-up      counts on from the checkpoint's step; begun again, it would erase the EMA in one step
    seed             another than training's, so that noise and order are new
"""

import argparse
import os

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')     # before torch: idle CPU threads sleep, see train.py

import torch
import torch.distributed as dist

import data
import model
import train
from model import BadInput

ARCHITECTURE = ('method', 'model', 'resolution', 'channels', 'sigma_data', 'diffusion')


def parse(argv):
    parser = argparse.ArgumentParser(description='Unmasked tuning.', allow_abbrev=False)
    flag = parser.add_argument
    flag('checkpoint', help='file of train.py or finetune.py, or published weights')
    flag('--out', required=True, help='folder for all that is written, not the one training wrote to')
    flag('--data', help='data folder (default: the one trained on)')
    flag('--lr', type=float, default=5e-5, help='learning rate')
    flag('--seed', type=int, help="(default: one more than training's, so that noise and order are new)")
    train.shared_flags(parser, steps=50_000, batch=128)
    return parser.parse_args(argv)


def tunable(weights):
    """Weights of the network that masks nothing: all but the parameters that only masked training has."""
    return {name: value for name, value in weights.items() if not name.startswith(model.TRAINING_ONLY)}


def main(argv=None):
    args = parse(argv)
    state = model.read_checkpoint(args.checkpoint)
    model.empty_net(state, args.checkpoint)                                   # or it is refused
    trained = state['config']
    if 'model' not in state:
        raise BadInput(f'{args.checkpoint} holds the EMA weights alone (--export): tuning continues `model` '
                       f'as well, so give a checkpoint of train.py')
    if not (args.data or trained['data']):
        raise BadInput(f'{args.checkpoint} does not say what it was trained on: give a data folder '
                       f'with --data')
    dataset = data.open_data(args.data or trained['data'])
    theirs, ours = (trained['resolution'], trained['channels']), (dataset.resolution, dataset.channels)
    if theirs != ours:
        raise BadInput(f'{dataset.path} has resolution and channels {ours}, and {args.checkpoint} was '
                       f'trained on {theirs}: give other --data')
    if trained['classes'] and not dataset.classes:
        raise BadInput(f'{dataset.path} has no labels, and {args.checkpoint} was trained with '
                       f'{trained["classes"]} classes: give data with labels')
    classes = dataset.classes if trained['classes'] else 0                    # without labels, for ever so
    seed = trained.get('seed', 0) + 1 if args.seed is None else args.seed
    cfg = {name: trained[name] for name in ARCHITECTURE} | {
        'stage': 'tune', 'classes': classes, 'class_names': dataset.class_names if classes else [],
        'data': str(dataset.path), 'kind': dataset.kind, 'count': dataset.count, 'mask_ratio': 0.0,
        'steps': args.steps, 'batch': args.batch, 'lr': args.lr, 'lr_decay': args.lr_decay, 'seed': seed,
        'ema_step': trained['ema_step'] + state['step'], 'tuned_from': args.checkpoint,
        'scale': dataset.scale, 'vae': dataset.vae, 'vae_sha256': dataset.vae_sha256}
    start = [tunable(state[name]) for name in ('model', 'ema')]
    if classes != trained['classes']:
        if int(os.environ.get('RANK', 0)) == 0:
            print(f'labels    {trained["classes"]} classes were trained and the data has {classes}: the '
                  f'label table is new, but for the row of dropped labels')
        width, rng = start[0]['y_embed.weight'].shape[1], model.generator('cpu', seed, 'labels')
        rows = 0.02 * torch.randn(classes, width, generator=rng)
        for weights in start:
            weights['y_embed.weight'] = torch.cat([rows, weights['y_embed.weight'][-1:]])
    path = train.train(args, cfg, dataset, start)

    lines = [line for line in train.read_log(path.parent) if 'held_out' in line]
    if lines and (not dist.is_initialized() or dist.get_rank() == 0):
        before, after = lines[0], lines[-1]
        print('\nheld-out loss by noise level')
        print(train.show({'before': before['held_out'], 'after': after['held_out']}))
    return path


if __name__ == '__main__':
    train.script('finetune.py', main)
