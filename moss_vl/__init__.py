"""The package `moss_vl`. Importing it makes the Auto classes of transformers load every MOSS-VL checkpoint with this
code, without `trust_remote_code` and whatever code lies in the folder of the checkpoint."""

from pathlib import Path


if not Path(__file__).with_name("configuration_moss_vl.py").is_file():
    # A checkout: transformers loads remote code from one flat folder, so the modules lie in the root.
    __path__ = [str(Path(__file__).resolve().parents[1])]


def _register() -> None:
    """Registers the classes for the model type of the config, in all Auto classes that this transformers has."""
    import transformers
    from transformers.utils import is_torchvision_available

    from .configuration_moss_vl import AUTO_MODELS, MossVLConfig, MossVLTextConfig, MossVLVisionConfig
    from .image_processing_moss_vl import MossVLImageProcessor
    from .modeling_moss_vl import MossVLForConditionalGeneration, MossVLTextModel, MossVLVisionModel
    from .processing_moss_vl import MossVLProcessor
    from .video_processing_moss_vl import MossVLVideoProcessor

    for config in (MossVLConfig, MossVLTextConfig, MossVLVisionConfig):
        transformers.AutoConfig.register(config.model_type, config)
    for name in AUTO_MODELS:
        if hasattr(transformers, name):
            getattr(transformers, name).register(MossVLConfig, MossVLForConditionalGeneration)
    transformers.AutoModel.register(MossVLTextConfig, MossVLTextModel)
    transformers.AutoModel.register(MossVLVisionConfig, MossVLVisionModel)
    transformers.AutoProcessor.register(MossVLConfig, MossVLProcessor)
    transformers.AutoImageProcessor.register(MossVLConfig, slow_image_processor_class=MossVLImageProcessor)
    if is_torchvision_available():  # without torchvision, AutoVideoProcessor cannot be used at all
        transformers.AutoVideoProcessor.register(MossVLConfig, MossVLVideoProcessor)


_register()
