"""Token weights inside a Megatron-LM or Megatron-Bridge run that exists already.

Two things are put into such a run, the rest stays as it is:

    from lctw_megatron.plugin.dataset import dataset_class
    from lctw_megatron.plugin.forward_step import weighted_forward_step

    weighting = {"scheme": "dense", "interpolation": 0.75}
    GPTDataset = dataset_class(weighting)
    pretrain(..., weighted_forward_step(forward_step, weighting))

``pretrain_gpt.py`` and ``pretrain_bridge.py`` beside this file are whole scripts that run. Nothing
of megatron-core is changed.
"""
