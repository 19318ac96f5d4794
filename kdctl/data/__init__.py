"""The tables of data sources and augmentations: name -> ("module:Class", summary[, preset arguments])."""

from __future__ import annotations

SOURCES = {
    "digits": ("digits:Digits", "UCI handwritten digits, 1,797 grey images of 8x8, inside the package"),
    "cifar10": ("cifar:Cifar", "CIFAR-10, 60,000 colour images of 32x32, 10 classes", {"name": "cifar10"}),
    "cifar100": ("cifar:Cifar", "CIFAR-100, 60,000 colour images of 32x32, 100 classes", {"name": "cifar100"}),
    "mnist": ("mnist:Mnist", "MNIST, 70,000 grey images of 28x28, 10 digits", {"name": "mnist"}),
    "fashion_mnist": ("mnist:Mnist", "Fashion-MNIST, 70,000 grey images of 28x28", {"name": "fashion_mnist"}),
    "npz": ("npz:Npz", "your own arrays: x_train, y_train, x_test, y_test in one .npz file"),
    "text": ("text:Text", "your own texts with labels: .tsv, .csv or .jsonl files"),
    "corpus": ("corpus:Corpus", "your own plain texts for language models: .txt or .jsonl files"),
    "hub_text": ("hub:HubText", "texts with labels of a data set on the Hugging Face Hub, by name"),
    "hub_corpus": ("hub:HubCorpus", "plain texts of a data set on the Hugging Face Hub, by name"),
    "image_folder": ("image_folder:ImageFolder", "image files in train/<class>/ and test/<class>/"),
}

AUGMENTATIONS = {
    "random_crop": ("spatial:RandomCrop", "zero padding, then a window at a random place"),
    "horizontal_flip": ("spatial:HorizontalFlip", "left and right exchanged with probability p"),
    "cutout": ("spatial:Cutout", "a black square at a random place"),
    "random_resized_crop": ("spatial:RandomResizedCrop", "a window of random area and aspect, resized"),
    "color_jitter": ("color_jitter:ColorJitter", "random brightness, contrast and saturation"),
    "mask_tokens": ("mask_tokens:MaskTokens", "some tokens of a text hidden behind the tokenizer's mask"),
    "rand_augment": ("rand_augment:RandAugment", "a few random operations of one strength"),
}
