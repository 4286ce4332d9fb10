"""Looking at labels: overlays of masks on their images."""
