"""Sentences and prompts the demo judges quality on. Written for it; no model or scale was ever fitted to them."""

from __future__ import annotations

SENTENCES: dict[str, tuple[str, ...]] = {
    "English": (
        "The ferry leaves the harbour at seven unless the wind turns.",
        "Please send the invoice again, the first copy had no date on it.",
        "A kernel that reads its weights once per batch is limited by arithmetic, not by memory.",
        "No.",
    ),
    "German": (
        "Der Zug nach Norden hat heute vierzig Minuten Verspätung.",
        "Sie stellte die Gießkanne neben die Tür und vergaß sie dort bis zum Herbst.",
        "Wie viele Äpfel passen in diesen Korb?",
        "Die Rechnung stimmt erst, wenn man die Rundung mitzählt.",
    ),
    "French": (
        "Le boulanger ouvre avant l'aube et ferme à midi.",
        "Nous avons perdu la clé de la cave, il faudra appeler quelqu'un.",
        "La température de l'eau ne dépasse jamais douze degrés en mars.",
        "Pourquoi le résultat change-t-il quand on ajoute un fil d'exécution ?",
    ),
    "Spanish": (
        "El puente viejo se cerró después de la crecida del río.",
        "Mañana tenemos que pintar la cerca antes de que llueva.",
        "¿Cuánto tarda una carta en llegar a la isla?",
        "La biblioteca presta instrumentos musicales los jueves.",
    ),
    "Italian": (
        "Il mercato del pesce chiude quando le barche tornano vuote.",
        "Ho lasciato gli occhiali sul tavolo della cucina, vicino al pane.",
        "Questa strada finisce davanti a un mulino abbandonato.",
        "La somma è giusta, ma l'ordine delle righe è sbagliato.",
    ),
    "Portuguese": (
        "A chuva parou, mas o campo continua alagado.",
        "Ela aprendeu a consertar relógios com o avô.",
        "O último ônibus passa às onze e meia.",
        "Quantos bytes ocupa uma linha da tabela?",
    ),
    "Dutch": (
        "De brug gaat open als er een hoog schip aankomt.",
        "Vergeet niet de planten water te geven voordat je vertrekt.",
        "Het museum bewaart honderden kaarten van de kust.",
    ),
    "Polish": (
        "Stary zegar na wieży spóźnia się o kwadrans.",
        "Kupiliśmy drewno na zimę już w sierpniu.",
        "Czy ten pociąg zatrzymuje się na każdej stacji?",
    ),
    "Turkish": (
        "Köyün çeşmesi yazın bile buz gibi akar.",
        "Toplantı yarına ertelendi çünkü salon doluydu.",
        "Bu kitabı üç kere okudum ve her seferinde güldüm.",
    ),
    "Russian": (
        "Снег растаял за одну ночь, и дорога стала непроходимой.",
        "Он хранит старые письма в коробке из-под чая.",
        "Сколько стоит билет до конечной станции?",
    ),
    "Greek": (
        "Το καΐκι έφυγε χωρίς τον καπετάνιο.",
        "Η γιαγιά φυλάει το λάδι σε πήλινα δοχεία.",
    ),
    "Arabic": (
        "وصلت القافلة إلى الواحة قبل غروب الشمس.",
        "أين وضعت مفتاح الباب الخلفي؟",
        "الحساب صحيح لكن التقريب يغير الرقم الأخير.",
    ),
    "Hebrew": ("הרכבת האחרונה יוצאת בחצות מהתחנה המרכזית.", "שכחנו לסגור את החלון והחתול יצא."),
    "Hindi": (
        "बारिश के बाद खेतों में पानी भर गया।",
        "क्या यह दुकान रविवार को खुलती है?",
        "दादी की रसोई से इलायची की खुशबू आती है।",
    ),
    "Chinese": ("渡船每天早上七点离开码头。", "请把窗户关上，外面的风太大了。", "这台机器只有两个核心，却跑得很快。"),
    "Japanese": (
        "駅前の本屋は来月で閉店するそうです。",
        "雨が止んだら、庭の木を植え替えましょう。",
        "計算の順序が変わると、最後の桁が変わります。",
    ),
    "Korean": (
        "산길이 무너져서 우회로로 가야 합니다.",
        "어제 산 우산을 벌써 잃어버렸어요.",
        "이 표의 합계는 반올림하기 전의 값입니다.",
    ),
    "Vietnamese": ("Con thuyền nhỏ trôi chậm dưới cây cầu đá.", "Hôm nay chợ đóng cửa sớm vì trời mưa to."),
    "Swahili": ("Mvua ilinyesha usiku kucha na mto ukafurika.", "Tafadhali niambie bei ya samaki huyu."),
    "Finnish": ("Järvi jäätyi tänä vuonna vasta tammikuussa.", "Unohdin sateenvarjon bussiin taas kerran."),
}

PROMPTS: tuple[str, ...] = (
    "The easiest way to dry herbs at home is",
    "Once the lighthouse keeper had climbed the stairs, he",
    "To compute the average of a list of numbers in Python,",
    "Water boils at a lower temperature on a mountain because",
    "The three things to check before a long bicycle trip are",
    "A library is different from a bookshop because",
    "Dear neighbour, I am writing to you about",
    "Rounding to the nearest even number is useful when",
)


def all_sentences() -> list[str]:
    """Every sentence of every language, in a fixed order."""
    return [sentence for group in SENTENCES.values() for sentence in group]
