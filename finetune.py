"""The same training with nothing masked: the short tuning that closes the gap to inference.

    python finetune.py out/0400000.pt --out tuned                                # MC-DiT's appendix A.2
    torchrun --nproc_per_node 4 finetune.py out/0400000.pt --out tuned --batch 512
    python finetune.py DiT-XL-2-256x256.pt --data flowers --out tuned       # published weights, other classes

In masked training the decoder meets positions that are not the encoder's tokens; in sampling it never does.
So the loss is now DiT's, over all tokens, through encoder and decoder. What changes against train.py:

    mask ratio       0: no parameters that fill masked positions, and no teacher
    weights          `model` and `ema` of the checkpoint, each continued
    optimizer        fresh; learning rate 5e-5, batch 128
    EMA warm-up      counts on from the checkpoint's step; restarted, it would erase the EMA in one step
    seed             another than training's, so that noise and order are new

To resume, run the same command again: --out is then all it reads, and the checkpoint may be gone.
"""

import argparse
import dataclasses
import os
import pathlib

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')     # before torch: idle CPU threads sleep, see train.py

import torch

import data
import model
import train
from model import check


def parse(argv):
    parser = argparse.ArgumentParser(description='Unmasked tuning.', allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag('checkpoint', help='file of train.py or finetune.py, or published weights')
    flag('--out', required=True, help="folder for everything that is written, another than training's")
    flag('--data', help='data folder; None: the one of the training')
    flag('--lr', type=float, default=5e-5, help='learning rate')
    flag('--seed', type=int, help="None: one more than the training's")
    train.shared_flags(parser, steps=50_000, batch=128)
    return parser.parse_args(argv)


def new_label_rows(weights, classes, seed):
    """Replace the label table by a new one for other classes; its last row, of dropped labels, stays."""
    old = weights['encoder.y_embed.weight']
    rows = 0.02 * torch.randn(classes, old.shape[1], generator=model.generator('cpu', seed, 'labels'))
    return weights | {'encoder.y_embed.weight': torch.cat([rows, old[-1:]])}


def main(argv=None):
    args, start = parse(argv), None
    resumed = train.newest_checkpoint(pathlib.Path(args.out), verify=False)[1]
    if resumed:
        trained = resumed['config']
        check(trained.stage == 'tune', f'{args.out} holds a run of train.py: choose another --out')
        cfg, seed = trained, trained.seed if args.seed is None else args.seed
        if args.checkpoint != trained.tuned_from and data.rank_and_world()[0] == 0:
            print(f'note: {args.out} resumes a tuning of {trained.tuned_from}; {args.checkpoint} is not read')
    else:
        state = model.read_checkpoint(args.checkpoint)
        trained = state['config']
        check('model' in state, f'{args.checkpoint} holds EMA weights only: tuning continues `model` as well')
        seed = trained.seed + 1 if args.seed is None else args.seed
        cfg = dataclasses.replace(trained, stage='tune', mask_ratio=0.0, unmasked=0.0,
                                  ema_step=trained.ema_step + state['step'], tuned_from=args.checkpoint)

    # the data: the network's size is given, its classes may be others
    path = args.data or trained.data
    check(path, f'{args.checkpoint} does not record its data: give a data folder with --data')
    dataset = data.open_data(path)
    check((dataset.resolution, dataset.channels) == (trained.resolution, trained.channels),
          f'{path} holds {dataset.channels} channels of {dataset.resolution} pixels a side, and the network '
          f'was trained on {trained.channels} of {trained.resolution}: give other --data')
    check(dataset.classes or not trained.classes, f'{path} has no labels, and the network was trained with '
          f'{trained.classes} classes: give data with labels')
    cfg = dataclasses.replace(cfg, seed=seed, steps=args.steps, batch=args.batch, lr=args.lr,
                              lr_decay=args.lr_decay, **train.describe(dataset, labelled=trained.classes > 0))
    if not resumed:
        start = [{name: value for name, value in weights.items() if not name.startswith(model.TRAINING_ONLY)}
                 for weights in (state['model'], state['ema'])]
        if cfg.classes != trained.classes:
            if data.rank_and_world()[0] == 0:
                print(f'labels    {trained.classes} classes were trained and the data has {cfg.classes}: the '
                      f'label table is new, except for the row of dropped labels')
            start = [new_label_rows(weights, cfg.classes, seed) for weights in start]
    path = train.train(args, cfg, dataset, start)

    if data.rank_and_world()[0] == 0:
        lines = [line for line in train.read_log(path.parent) if 'held_out' in line]
        print('\nheld-out loss by noise level')
        print(train.show({'before': lines[0]['held_out'], 'after': lines[-1]['held_out']}))
    return path


if __name__ == '__main__':
    data.script('finetune.py', main)
