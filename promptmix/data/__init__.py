"""Data: pictures and their labels, few-shot and base/new splits, transforms and loaders."""

from promptmix.data.base import DATASET_REGISTRY, DatasetBase, build_dataset, require_folder
from promptmix.data.datum import Datum
from promptmix.data.fewshot import generate_fewshot, load_split, save_split, split_by, subsample_classes
from promptmix.data.reading.images import read_image
from promptmix.data.reading.manager import DataManager, DatasetWrapper, build_data_loader
from promptmix.data.reading.samplers import build_sampler
from promptmix.data.reading.transforms import INTERPOLATION_MODES, build_transform

__all__ = [
    "DATASET_REGISTRY",
    "INTERPOLATION_MODES",
    "DataManager",
    "DatasetBase",
    "DatasetWrapper",
    "Datum",
    "build_data_loader",
    "build_dataset",
    "build_sampler",
    "build_transform",
    "generate_fewshot",
    "load_split",
    "read_image",
    "require_folder",
    "save_split",
    "split_by",
    "subsample_classes",
]
