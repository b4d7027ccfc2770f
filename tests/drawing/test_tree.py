"""Pictures of trees: where nodes stand, which are shown, and that files are complete."""

import xml.etree.ElementTree as ET

import pytest
import torch

from diffalign.core import Node, Tree
from diffalign.drawing.tree import SIDE, layout, save_tree, tree_picture, tree_svg


def tree(scores=(0.3, 0.9, 0.1, 0.5)):
    """Two branches of two images; each image has a colour of its own."""
    nodes = [Node(None, 0, 0.4, 5), Node(0, 3, 0.6, 3), Node(0, 3, 0.3, 3)]
    images = []
    for i, score in enumerate(scores):
        nodes.append(Node(1 + i // 2, 8, score, 1, image=i))
        images.append(torch.full((3, 4, 4), i / 5))
    best = 3 + max(range(len(scores)), key=scores.__getitem__)
    return Tree(tuple(nodes), tuple(images), (0, nodes[best].parent, best))


def test_best_branch_first_and_states_in_the_middle_of_their_children():
    places = layout(tree())
    assert places.leaves == (4, 3, 6, 5)
    assert places.rows == {4: 0, 3: 1, 6: 2, 5: 3, 1: 0.5, 2: 2.5, 0: 1.5}
    assert places.count == 8


def test_only_the_best_images_are_shown():
    places = layout(tree(), most=2)
    assert places.leaves == (4, 6)
    assert set(places.rows) == {0, 1, 2, 4, 6}
    assert layout(tree(), most=1).rows == {0: 0, 1: 0, 4: 0}


def test_every_image_is_painted_in_its_colour():
    picture = tree_picture(tree(), "a title")
    assert picture.width == 1000
    colours = {(51 * i,) * 3 for i in range(4)}
    counts = {colour: n for n, colour in picture.getcolors(1 << 20)}
    for colour in colours:
        assert counts.get(colour, 0) >= (SIDE - 6) ** 2, colour


def test_svg_holds_scores_as_text_and_is_repeatable():
    text = tree_svg(tree(), "a red apple")
    words = [element.text for element in ET.fromstring(text).iter() if element.text]
    assert {"0.300", "0.900", "0.100", "0.500", "a red apple"} <= {word.strip() for word in words}
    assert text.count("data:image/png;base64") >= 4
    assert tree_svg(tree(), "a red apple") == text


def test_files(tmp_path):
    paths = save_tree(tree(), tmp_path)
    assert [path.name for path in paths] == ["tree.png", "tree.svg"]
    assert all(path.stat().st_size > 1000 for path in paths)


def test_a_tree_without_images_is_refused():
    with pytest.raises(ValueError, match="no finished image"):
        layout(Tree((Node(None, 0, 0.0, 1),), ()))
