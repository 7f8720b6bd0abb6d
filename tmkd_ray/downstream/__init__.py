"""What a trained student is worth elsewhere: frozen features, detection, segmentation; without Ray."""
