"""The main job on a real model: calibrate, initialise, fine-tune, compare, save, reload."""
