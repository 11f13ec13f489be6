"""Deblurring with a diffusion prior: data sets of images, degradations, kernel estimation."""
