"""Trains the benchmarks' U-Net on Fashion-MNIST (16 x 16) or CIFAR-10.

    python benchmarks/train_unet.py --name fashion --data fashion_mnist.npz

takes about an hour on two CPU cores for Fashion-MNIST and writes `weights/unet_<name>.safetensors`
beside this file. `_training.py` has the objective, `unet.py` the network and the data's formats.
"""

from __future__ import annotations

import unet
from _training import Network, parse, parser, train


def main() -> None:
    """Parses the command line and trains."""
    made = parser(__doc__, "train_unet", unet.WEIGHTS, steps=5000, batch=128, learning_rate=1e-3)
    made.add_argument("--name", choices=tuple(unet.SETTINGS), default="fashion")
    made.add_argument(
        "--data", required=True, help="; ".join(f"{k}: {v}" for k, v in unet.DOWNLOADS.items())
    )
    args = parse(made)
    if args.out == unet.WEIGHTS:
        args.out = unet.WEIGHTS / f"unet_{args.name}.safetensors"
    images, labels = unet.load_data(args.name, args.data)
    print(f"{args.name}: {images.shape}, standard deviation {images.std():.4f}", flush=True)
    init = unet.init_for(args.name, images.shape[1:])
    sigma_data = unet.SETTINGS[args.name][2]
    network = Network(init, unet.apply_for(args.name), sigma_data, unet.NUM_CLASSES, 1)
    train(network, images, labels, args)


if __name__ == "__main__":
    main()
