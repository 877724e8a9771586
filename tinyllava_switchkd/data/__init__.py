"""What a model reads: conversation templates, images, data sets and batches."""

from tinyllava_switchkd.data.collator import DataCollatorForSupervisedDataset
from tinyllava_switchkd.data.dataset import LazySupervisedDataset
from tinyllava_switchkd.data.errors import SampleError
from tinyllava_switchkd.data.image import ImagePreprocess
from tinyllava_switchkd.data.image_files import BadImageError, read_image, to_rgb
from tinyllava_switchkd.data.inspection import check_data
from tinyllava_switchkd.data.module import check_supervision, make_supervised_data_module
from tinyllava_switchkd.data.records import Records
from tinyllava_switchkd.data.sampler import LengthGroupedSampler
from tinyllava_switchkd.data.template import Template, TemplateFactory, check_template, register_template
from tinyllava_switchkd.data.text import Message, TextPreprocess

__all__ = [
    "BadImageError",
    "DataCollatorForSupervisedDataset",
    "ImagePreprocess",
    "LazySupervisedDataset",
    "LengthGroupedSampler",
    "Message",
    "Records",
    "SampleError",
    "Template",
    "TemplateFactory",
    "TextPreprocess",
    "check_data",
    "check_supervision",
    "check_template",
    "make_supervised_data_module",
    "read_image",
    "register_template",
    "to_rgb",
]
