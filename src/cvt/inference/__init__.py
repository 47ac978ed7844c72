"""From images to labels and scores, and how good those are."""
