"""Settings for trainings that take seconds."""

TINY = (
    "data=synthetic",
    "data.synthetic.tiles=200",
    "data.synthetic.size=32",
    "data.allow_unvalidated=true",
    "model.name=test_resnet",
    "optim.batch_size=20",
    "trainer.epochs=2",
    "trainer.precision=fp32",
    "model.tta_views=1",
    "trainer.threads=1",
    "distill.teacher=none",
    "distill.features=0",
    "distill.share=0.9",
)
"""Overrides for a complete training in seconds: timm's test network on 200 small tiles."""
