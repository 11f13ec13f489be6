"""AP or PA, read off the image where the table does not say."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from .images import to_grey

VIEWS = ("PA", "AP")


def fill_views(dataset: Dataset, views: Sequence[str] = VIEWS) -> tuple[Dataset, float | None]:
    """Predict the view of those images of a data set that have none, from those that have one.

    A logistic regression on the means of 16 x 16 cells and a histogram of the grey values.

    Returns:
        (dataset, auroc): the data set with a view in every row; the AUROC of the classifier on patients it was not
        fitted to (5-fold), or None where every image had a view.

    Raises:
        ValueError: fewer than ten images of one of the two views to learn from.
    """
    given = np.asarray(dataset["view"][:])
    unknown = ~np.isin(given, views)
    if not unknown.any():
        return dataset, None
    counts = {view: int((given == view).sum()) for view in views}
    if min(counts.values()) < 10:
        raise ValueError(f"expected at least 10 images of each view to learn the others from, got {counts}")
    features = np.stack([view_features(image) for image in tqdm(dataset["image"], desc="views", unit="image", delay=2)])
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    target = given[~unknown] == views[1]
    patients = np.asarray(dataset["patient"][:])[~unknown]
    folds = cross_val_predict(
        classifier, features[~unknown], target, groups=patients, cv=GroupKFold(5), method="predict_proba"
    )
    classifier.fit(features[~unknown], target)
    predicted = np.where(classifier.predict(features[unknown]), views[1], views[0])
    filled = given.astype(object)
    filled[unknown] = predicted
    dataset = dataset.remove_columns("view").add_column("view", [str(view) for view in filled])
    return dataset, float(roc_auc_score(target, folds[:, 1]))


def view_features(image: PIL.Image.Image) -> np.ndarray:
    """PIL image -> (288,) means of 16 x 16 cells, and a histogram, of the grey values stretched to [0, 1]."""
    values = np.asarray(to_grey(image)).astype(np.float32)
    values = (values - values.min()) / max(float(np.ptp(values)), 1e-6)
    cells = PIL.Image.fromarray(values).resize((16, 16), PIL.Image.Resampling.BOX)
    histogram = np.histogram(values, bins=32, range=(0, 1))[0] / values.size
    return np.concatenate([np.asarray(cells).ravel(), histogram])
