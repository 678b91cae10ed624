"""What is predicted of a slide: one small class per kind of target, with its loss, prediction and what it refuses."""
