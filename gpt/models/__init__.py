"""The chapters' models in historical order, and `base`, the interface that they share."""
